"""Trains a configuration on made-up tokens inside ``run_ranks`` or a pool, and says what came out by global names.

The model, its optimizer and each step are built and run as in ``run.py``. Every sample has its own share of masked
tokens, so that ranks and micro-batches hold uneven numbers of loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.config.run_config import RunConfig

Tensors = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """Losses and norms of every step; gradients of the first and weights before and after, by global name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    replicas: float = 0.0
    """Largest difference between ranks that hold the same element, relative to the largest element of its tensor."""


def train(config: RunConfig, iters: int, plant: Callable[[], None] | None = None) -> Outcome | None:
    """Train for ``iters`` steps on this rank; rank 0 returns the outcome of the whole job.

    Args:
        plant: changes code of this process before the model is built.
    """
    from megatron_slm import run, run_model
    from megatron_slm.parallel.gradients import gathered_parameters
    from megatron_slm.parallel.groups import build_groups
    from megatron_slm.train import step as train_step
    from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate

    if plant is not None:
        plant()
    groups = build_groups(config.parallel)
    device = torch.device("cpu")
    model = run_model.build_model(config, groups, device, config.model.vocab_size or 0)
    state: Any = model  # a step asks for the chunks and the optimizer alone
    plan = run.step_plan(config, groups, device)
    outcome = Outcome()
    outcome.initial = gathered(model.chunks, outcome)
    for step in range(iters):
        logged = train_step.forward_backward(state, plan, step_input(config, step, plan))
        outcome.grad_norms.append(gradient_norm(model.optimizer))
        if step == 0:
            outcome.gradients = gathered(model.chunks, outcome, reduced_gradients(model))
        set_learning_rate(model.optimizer, config.optimizer.lr, config.optimizer.lr)
        apply_update(model.optimizer, outcome.grad_norms[-1])
        agreed = train_step.agree(logged, plan, suspected=False, stop=False, trouble=False)
        outcome.losses.append(agreed.means["lm loss"])
    with gathered_parameters(model.chunks):
        outcome.weights = gathered(model.chunks, outcome)
    return outcome if dist.get_rank() == 0 else None


def step_input(config: RunConfig, step: int, plan: Any) -> Any:
    """This rank's share of one global batch, cut as the stage cuts it."""
    from megatron_slm.stages import pretrain
    from megatron_slm.train.step import StepInput

    cursor: Any = None  # which sample comes next is no question here
    return StepInput([pretrain.local_batch(batch, plan) for batch in micro_batches(config, step, plan.groups)], cursor)


def micro_batches(config: RunConfig, step: int, groups: Any) -> list[Tensors]:
    """Micro-batches [B, S] of this data-parallel rank: a function of the configuration and the step alone."""
    generator = torch.Generator().manual_seed(step)
    train, model = config.train, config.model
    samples, length, vocab = train.global_batch_size, model.seq_length, model.vocab_size or 0
    tokens = torch.randint(0, vocab, (samples, length + 1), generator=generator)
    keep = torch.rand(samples, 1, generator=generator)
    mask = (torch.rand(samples, length, generator=generator) < keep).float()
    documents = (torch.rand(samples, length, generator=generator) < 0.15).long().cumsum(dim=1)
    size, dp, rank = train.micro_batch_size, groups.dp.size(), groups.dp.rank()
    batches = []
    for first in range(rank * size, samples, size * dp):
        part = slice(first, first + size)
        batch = {
            "tokens": tokens[part, :-1].contiguous(),
            "labels": tokens[part, 1:].contiguous(),
            "loss_mask": mask[part].contiguous(),
            "position_ids": torch.arange(length).expand(size, -1).contiguous(),
        }
        if config.data.reset_attention_mask:
            batch["document_ids"] = documents[part].contiguous()
        batches.append(batch)
    return batches


def reduced_gradients(model: Any) -> dict[Any, torch.Tensor]:
    """Gradient that updates each parameter; NaN where another data-parallel rank owns the element."""
    from megatron_slm.train.optimizer_state import named_masters

    found: dict[Any, torch.Tensor] = {}
    for master in named_masters(model.optimizer, model.chunks):
        flat = found.setdefault(master.param, torch.full_like(master.param, float("nan"))).view(-1)
        if master.tensor.grad is not None:
            flat[master.start : master.start + master.tensor.numel()] = master.tensor.grad.view(-1)
    return found


def gathered(chunks: list[Any], outcome: Outcome, values: dict[Any, torch.Tensor] | None = None) -> Tensors:
    """Parameters (or ``values`` in their place) of the whole job as global tensors, on every rank.

    Ranks that hold the same element must agree; ``outcome.replicas`` says how far they do not.
    """
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.parallel.initialise import shards

    kept = {}
    if values is not None:
        for param in (param for chunk in chunks for param in chunk.parameters()):
            kept[param] = param.data
            param.data = values.get(param, torch.full_like(param.data, float("nan")))
    mine = [
        (shard.key, shard.global_shape, shard.global_offset, shard.local_shape, shard.data.detach().clone())
        for shard in shards([unwrap(chunk) for chunk in chunks])
    ]
    for param, data in kept.items():
        param.data = data
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    result: Tensors = {}
    for key, shape, offset, local, data in (entry for rank in everyone for entry in rank):
        whole = result.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        stacked = len(shape) - len(local)
        index = tuple(offset[:stacked]) + tuple(
            slice(start, start + size) for start, size in zip(offset[stacked:], local, strict=True)
        )
        there, here = whole[index], data.view(local)
        both = ~(there.isnan() | here.isnan())
        if both.any():
            scale = float(here[both].abs().max()) or 1.0
            outcome.replicas = max(outcome.replicas, float((there - here)[both].abs().max()) / scale)
        whole[index] = torch.where(here.isnan(), there, here)
    return result


def worst_difference(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """Largest error of a tensor in units of the expected tensor's norm, and its name."""
    if found.keys() != expected.keys():
        raise AssertionError(f"other parameters: {sorted(found.keys() ^ expected.keys())}")
    errors = {}
    for name, tensor in expected.items():
        norm = tensor.double().norm()
        error = (found[name].double() - tensor.double()).norm() / (norm if norm > 0 else 1.0)
        errors[name] = float("inf") if error.isnan() else float(error)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
