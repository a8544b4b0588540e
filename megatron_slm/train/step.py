"""One optimizer step: state in, named result out. No logging, no saving, no decision about when to stop.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_slm.data.cursor import Cursor
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.gradients import zero_gradients
from megatron_slm.parallel.groups import is_last_pipeline_rank
from megatron_slm.parallel.pipeline import Batch, LossFunction, run_schedule
from megatron_slm.train.hook import StepResult, StepTimes
from megatron_slm.train.optimizer import set_learning_rate, update
from megatron_slm.train.random_state import RandomState


class StepInput(NamedTuple):
    """One global batch: this rank's micro-batches of tensors [B, S], and the cursor once they are consumed."""

    micro_batches: list[Batch]
    cursor: Cursor


@dataclass
class TrainState:
    """What changes while a run runs, and what its checkpoint therefore holds."""

    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    random: RandomState
    cursor: Cursor
    step: int = 0


@dataclass(frozen=True)
class StepPlan:
    """What stays the same for every step of a run.

    Attributes:
        loss: of the stage.
        learning_rate: of the step that begins after so many steps.
        peak_learning_rate: the configured rate that parameter groups keep their ratio to.
        groups: process groups.
        device: this rank's.
    """

    loss: LossFunction
    learning_rate: Callable[[int], float]
    peak_learning_rate: float
    seq_length: int
    groups: Any
    device: torch.device


def train_step(
    state: TrainState, plan: StepPlan, next_input: Callable[[], StepInput], checkpoint_seconds: float
) -> StepResult:
    """Take the next global batch through forward, backward and update; ``state`` advances. Collective.

    Args:
        next_input: gives the global batch; its time is the step's data time.
        checkpoint_seconds: of a save since the last step, passed through to the record.
    """
    started = time.perf_counter()
    inputs = next_input()
    loaded = time.perf_counter()
    zero_gradients(state.chunks)
    state.optimizer.zero_grad()
    logged = run_schedule(
        state.chunks,
        inputs.micro_batches,
        plan.loss,
        forward_only=False,
        seq_length=plan.seq_length,
        groups=plan.groups,
    )
    device_seam.synchronize(plan.device.type)
    computed = time.perf_counter()
    learning_rate = plan.learning_rate(state.step)
    set_learning_rate(state.optimizer, learning_rate, plan.peak_learning_rate)
    done = update(state.optimizer)
    loss, tokens = global_loss(logged, plan)
    ended = time.perf_counter()
    samples = inputs.cursor.consumed_samples - state.cursor.consumed_samples
    state.step += 1
    state.cursor = inputs.cursor
    return StepResult(
        step=state.step,
        consumed_samples=state.cursor.consumed_samples,
        consumed_tokens=state.cursor.consumed_samples * plan.seq_length,
        loss=loss,
        num_tokens=tokens,
        grad_norm=done.grad_norm,
        learning_rate=learning_rate,
        batch_size=samples,
        times=StepTimes(
            data=loaded - started,
            forward_backward=computed - loaded,
            optimizer=ended - computed,
            total=ended - started,
            checkpoint=checkpoint_seconds,
        ),
        skipped=not done.applied,
        sample_digest=state.cursor.rolling_digest,
    )


def global_loss(logged: list[dict[str, Tensor]], plan: StepPlan) -> tuple[float, int]:
    """Mean loss and number of loss tokens over all data-parallel ranks; (NaN, 0) where the model does not end.

    One all-reduce of two numbers over data parallelism, on the last pipeline stage only.
    """
    if not is_last_pipeline_rank(plan.groups):
        return math.nan, 0
    total = torch.stack([entry["lm loss"] for entry in logged]).sum(dim=0)
    if plan.groups.dp.size() > 1:
        dist.all_reduce(total, group=plan.groups.dp)
    summed, tokens = total.tolist()
    return (summed / tokens if tokens else math.nan), round(tokens)
