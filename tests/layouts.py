"""A checkpoint's logits and loss under any layout, from inside ``run_ranks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_slm.parallel.config import ParallelConfig


def loaded(parallel: ParallelConfig, groups: Any, checkpoint: Path) -> tuple[Any, int]:
    """This rank's chunk with the weights of ``checkpoint``, in evaluation mode, and the size of its vocabulary."""
    from megatron_slm.config.load import load
    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.train.checkpoint import load_weights

    config = load(checkpoint / "config.yaml").config
    core = transformer_config(config.model, parallel, config.precision, config.train, device="cpu")
    spec, norm, _ = choose_spec("cpu", config.model, packed_documents=False)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "an import names it"
    device = torch.device("cpu")
    own = {"spec": (spec, norm), "device": device, "lora": config.lora}
    chunks = build_chunks(config.model, core, groups, vocab_size=vocab_size, seed=0, **own)
    load_weights(checkpoint, chunks)
    return chunks[0].eval(), vocab_size


def joined(parallel: ParallelConfig) -> Any:
    """Groups and random streams of this rank."""
    from megatron_slm.parallel.groups import build_groups
    from megatron_slm.train.random_state import RandomState

    groups = build_groups(parallel)
    RandomState(0, dp_rank=0, pp_rank=groups.pp.rank())
    return groups


def logits_under(parallel: ParallelConfig, cases: dict[str, Path], prompt: torch.Tensor) -> dict[str, Any] | None:
    """Model -> logits [S, V] after ``prompt`` [1, S], on the first rank of those that end the model."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    groups = joined(parallel)
    found: dict[str, Any] = {}

    def forward_step(data: Any, model: Any) -> Any:
        output = model(input_ids=prompt, position_ids=torch.arange(prompt.shape[1])[None], attention_mask=None)
        return output, lambda logits, non_loss_data=True: logits

    for name, checkpoint in cases.items():
        model, vocab_size = loaded(parallel, groups, checkpoint)
        schedule = get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)
        with torch.no_grad():
            outputs = schedule(
                forward_step_func=forward_step,
                data_iterator=iter(()),
                model=model,
                num_microbatches=1,
                seq_length=prompt.shape[1],
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if outputs:
            parts = [torch.empty_like(outputs[0]) for _ in range(groups.tp.size())]
            dist.all_gather(parts, outputs[0].contiguous(), group=groups.tp)
            found[name] = torch.cat(parts, dim=-1)[0, :, :vocab_size]
    dist.barrier()
    return found if found and groups.tp.rank() == 0 else None


def loss_under(parallel: ParallelConfig, checkpoint: Path, tokens: torch.Tensor) -> float:
    """Mean cross-entropy of ``tokens`` [n, S + 1] in nats, a window a micro-batch."""
    from megatron_slm.parallel.groups import is_last_pipeline_rank, sum_over_world_from
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.stages import pretrain

    groups = joined(parallel)
    model, _ = loaded(parallel, groups, checkpoint)
    length = tokens.shape[1] - 1
    batches = [
        {
            "tokens": window[None, :-1].contiguous(),
            "labels": window[None, 1:].contiguous(),
            "loss_mask": torch.ones(1, length),
            "position_ids": torch.arange(length)[None],
        }
        for window in tokens
    ]
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for entry in run_schedule([model], batches, pretrain.loss, forward_only=True, seq_length=length, groups=groups):
            total += entry["lm loss"]
    mean = sum_over_world_from(total, counts=is_last_pipeline_rank(groups) and groups.tp.rank() == 0)
    return float(mean[0] / mean[1])
