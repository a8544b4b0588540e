"""Trains a small model on made-up tokens inside ``run_ranks``, and says what came out by global names.

Every sample has its own share of masked tokens, so that ranks and micro-batches hold uneven numbers of loss tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.model.config import LoraConfig, ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import OptimizerConfig, PrecisionConfig, TrainConfig

VOCAB = 500  # not a multiple of 128: the padding rows of the embedding must stay out of the loss

SMALL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, seq_length=32)


@dataclass(frozen=True)
class Task:
    """What is trained, how long, and what is compared afterwards."""

    model: ModelConfig = SMALL
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig(fp64=True)
    train: TrainConfig = TrainConfig(micro_batch_size=1, global_batch_size=4)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    iters: int = 20
    packed: bool = False
    lora: LoraConfig = LoraConfig()

    def on(self, **degrees: Any) -> Task:
        """The same task under another layout."""
        return replace(self, parallel=ParallelConfig(**degrees))


@dataclass
class Outcome:
    """Losses and norms of every step; gradients of the first and weights before and after, by global name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(task: Task) -> Outcome | None:
    """Run the task on this rank; rank 0 returns the outcome of the whole job."""
    from megatron_slm.parallel.gradients import zero_gradients
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.replay.shards import gradient_shards
    from megatron_slm.stages import pretrain
    from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate

    groups, chunks, optimizer = build(task)
    outcome = Outcome(initial=global_tensors(chunks))
    for step in range(task.iters):
        zero_gradients(chunks)
        optimizer.zero_grad()
        logged = run_schedule(
            chunks,
            micro_batches(task, step, groups),
            pretrain.loss,
            forward_only=False,
            seq_length=task.model.seq_length,
            groups=groups,
        )
        set_learning_rate(optimizer, task.optimizer.lr, task.optimizer.lr)
        outcome.grad_norms.append(gradient_norm(optimizer))
        if step == 0:
            outcome.gradients = gathered(gradient_shards(chunks, optimizer))
        apply_update(optimizer, outcome.grad_norms[-1])
        outcome.losses.append(mean_loss(logged, groups))
    with_full_parameters(chunks)
    outcome.weights = global_tensors(chunks)
    finish()
    return outcome if dist.get_rank() == 0 else None


def build(task: Task, ending: Any = None) -> tuple[Any, list[Any], Any]:
    """Groups, wrapped chunks and optimizer of this rank, as ``run.py`` builds them.

    Args:
        ending: of the model; the sums of pretraining by default.
    """
    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.ending import TokenSums
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.gradients import wrap
    from megatron_slm.parallel.groups import build_groups
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.parallel.vocab_loss import Objective
    from megatron_slm.train.optimizer import build_optimizer
    from megatron_slm.train.random_state import RandomState

    groups = build_groups(task.parallel)
    RandomState(task.train.seed, dp_rank=groups.dp_cp.rank(), pp_rank=groups.pp.rank())
    config = transformer_config(task.model, task.parallel, task.precision, task.train, device="cpu")
    spec, norm, _ = choose_spec("cpu", task.model, packed_documents=task.packed)
    chunks = build_chunks(
        task.model,
        config,
        groups,
        vocab_size=VOCAB,
        seed=task.train.seed,
        spec=(spec, norm),
        device=torch.device("cpu"),
        ending=ending or TokenSums(Objective(VOCAB, task.train.z_loss_coefficient, task.train.label_smoothing)),
        lora=task.lora,
    )
    chunks = wrap(
        chunks,
        config,
        task.parallel,
        groups,
        reduce_in_fp32=task.precision.bf16 and task.precision.accumulate_allreduce_grads_in_fp32,
    )
    optimizer = build_optimizer(
        chunks,
        task.optimizer,
        task.precision,
        groups,
        distributed=task.parallel.use_distributed_optimizer,
        width_multiplier=task.model.width_multiplier,
    )
    return groups, chunks, optimizer


def micro_batches(task: Task, step: int, groups: Any) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of one global batch: a function of the step alone."""
    from megatron_slm.parallel.context import cut_batch

    generator = torch.Generator().manual_seed(step)
    samples, length = task.train.global_batch_size, task.model.seq_length
    tokens = torch.randint(0, VOCAB, (samples, length + 1), generator=generator)
    keep = torch.rand(samples, 1, generator=generator)
    mask = (torch.rand(samples, length, generator=generator) < keep).float()
    documents = (torch.rand(samples, length, generator=generator) < 0.15).long().cumsum(dim=1)
    size, dp, rank = task.train.micro_batch_size, groups.dp.size(), groups.dp.rank()
    batches = []
    for first in range(rank * size, samples, size * dp):
        part = slice(first, first + size)
        batch = {
            "tokens": tokens[part, :-1].contiguous(),
            "labels": tokens[part, 1:].contiguous(),
            "loss_mask": mask[part].contiguous(),
            "position_ids": torch.arange(length).expand(size, -1).contiguous(),
        }
        if task.packed:
            batch["document_ids"] = documents[part].contiguous()
        batches.append(cut_batch(batch, groups.cp.rank(), groups.cp.size()))
    return batches


def mean_loss(logged: list[dict[str, torch.Tensor]], groups: Any) -> float:
    """Loss per token over the global batch, on every rank."""
    total = torch.zeros(2, dtype=torch.float64)
    for entry in logged:
        total += entry["lm loss"]
    if groups.tp.rank() != 0:
        total.zero_()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def global_tensors(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Parameters of the whole job as global tensors, on every rank."""
    from megatron_slm.replay.shards import local_shards

    return gathered(local_shards(chunks))


def gathered(mine: list[Any]) -> dict[str, torch.Tensor]:
    """Every rank's shards as global tensors, on every rank."""
    from megatron_slm.replay.shards import assembled

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return assembled(everyone)


def with_full_parameters(chunks: list[Any]) -> None:
    """Finish an overlapped gather, so that parameters are the updated ones."""
    from megatron_slm.parallel.gradients import gathered_parameters

    with gathered_parameters(chunks):
        pass


def finish() -> None:
    """Leave core's groups, so that the ranks can end in order."""
    dist.barrier()


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest error of a tensor in units of the expected tensor's norm, and its name."""
    assert found.keys() == expected.keys(), f"other parameters: {sorted(found.keys() ^ expected.keys())}"
    errors = {}
    for name, tensor in expected.items():
        norm = tensor.double().norm()
        error = (found[name].double() - tensor.double()).norm() / (norm if norm > 0 else 1.0)
        errors[name] = float("inf") if error.isnan() else float(error)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
