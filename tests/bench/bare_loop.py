"""The yardstick: core's own modules, schedule and optimizer in the shortest loop that trains, and nothing else.

No corpus, no log, no digests, no validation, no checkpoint, no agreement on stopping; tokens come from memory.
Under torchrun it is the yardstick of ``startup.py``; it then imports core as core's users do, and says when its
first step has ended.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import OptimizerConfig, PrecisionConfig, TrainConfig

VOCAB = 4096
# The case of the step-overhead benchmark: 4 layers, hidden 256, S 512, TP2, fp32.
MODEL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=512)
FIRST_STEP = "first step ended at"


@dataclass
class Bare:
    """What a loop over core needs, and nothing more."""

    chunks: list[Any]
    optimizer: Any
    groups: Any
    micro_batches: list[dict[str, Any]]
    seq_length: int

    def step(self) -> None:
        """Zero, forward and backward over the micro-batches, update."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(self.micro_batches),
            model=self.chunks[0],
            num_microbatches=len(self.micro_batches),
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batches[0]["tokens"].shape[0],
            forward_only=False,
        )
        self.optimizer.step()


def _forward(data: Any, model: Any) -> tuple[Any, Any]:
    batch = next(data)
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, lambda value: (value[0].clone(), batch["loss_mask"].sum().int(), {"lm loss": value[0].detach()})


def synthetic(count: int, samples: int, seq_length: int) -> list[dict[str, Any]]:
    """``count`` micro-batches of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, VOCAB, (samples, seq_length + 1), generator=generator)
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(samples, seq_length),
                "position_ids": torch.arange(seq_length).expand(samples, -1).contiguous(),
            }
        )
    return batches


def build(parallel: ParallelConfig, groups: Any, *, micro_batches: int, samples: int) -> Bare:
    """The model, its gradient buffers and its optimizer, from the same builders as a run's."""
    import torch

    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.gradients import wrap
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.train.optimizer import build_optimizer
    from megatron_slm.train.random_state import RandomState

    RandomState(1, dp_rank=groups.dp.rank(), pp_rank=groups.pp.rank())
    config = transformer_config(MODEL, parallel, PrecisionConfig(), TrainConfig(), device="cpu")
    spec, norm, _ = choose_spec("cpu", MODEL, packed_documents=False)
    chunks = build_chunks(
        MODEL, config, groups, vocab_size=VOCAB, seed=1, spec=(spec, norm), device=torch.device("cpu")
    )
    chunks = wrap(chunks, config, parallel, groups, reduce_in_fp32=False)
    optimizer = build_optimizer(chunks, OptimizerConfig(), PrecisionConfig(), groups, distributed=True)
    return Bare(chunks, optimizer, groups, synthetic(micro_batches, samples, MODEL.seq_length), MODEL.seq_length)


def main() -> None:
    """One step under torchrun on four ranks, TP2 x PP2, with core's plain imports."""
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    from megatron_slm.parallel import device as device_seam

    device_seam.preload("cpu")
    from megatron_slm.parallel.groups import process_groups

    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True, overlap_grad_reduce=True
    )
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with process_groups(parallel, device="cpu", rank=rank, world_size=world, master=master) as groups:
        build(parallel, groups, micro_batches=2, samples=1).step()
        if rank == world - 1:
            print(FIRST_STEP, time.time(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
