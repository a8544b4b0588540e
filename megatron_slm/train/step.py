"""One optimizer step: state in, named result out. No logging, no saving, no decision about when to stop.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from megatron_slm.train.guard import Guard, Verdict
from megatron_slm.train.hook import Hook, Part, StepResult, StepTimes
from megatron_slm.train.metrics import LM_LOSS
from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate
from megatron_slm.train.random_state import RandomState


class StepInput(NamedTuple):
    """One global batch: this rank's micro-batches of tensors [B, S/cp], and the cursor once they are consumed."""

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
    records: dict[str, Any] = field(default_factory=dict)
    """What hooks and guard remember, as JSON values by name."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Tensors beside model and optimizer, by name."""


@dataclass(frozen=True)
class StepPlan:
    """What stays the same for every step of a run.

    Attributes:
        loss: of the stage.
        learning_rate: of the step that begins after so many steps.
        peak_learning_rate: the configured rate that parameter groups keep their ratio to.
        groups: process groups.
        device: this rank's.
        logged: what ``loss`` logs, the loss itself first.
    """

    loss: LossFunction
    learning_rate: Callable[[int], float]
    peak_learning_rate: float
    seq_length: int
    groups: Any
    device: torch.device
    logged: tuple[str, ...] = (LM_LOSS,)


class Outcome(NamedTuple):
    """A step, judged. When the verdict forbids it, no update was made and ``state`` stands before the step."""

    result: StepResult
    verdict: Verdict
    inputs: StepInput
    random: dict[str, Any]
    """Random states before the step, to run it again."""
    stop: bool
    """Some rank wants to stop after this step."""
    trouble: bool
    """Work in the background has failed on some rank."""


class Agreed(NamedTuple):
    """What all ranks know of a step after their one exchange."""

    means: dict[str, float]
    tokens: int
    empty: bool
    """Nothing was counted."""
    suspected: bool
    stop: bool
    trouble: bool


def train_step(
    state: TrainState,
    plan: StepPlan,
    next_input: Callable[[], StepInput],
    guard: Guard,
    hooks: Sequence[Hook] = (),
    *,
    wants_stop: bool = False,
    checkpoint_seconds: float = 0.0,
) -> Outcome:
    """Take the next global batch through forward, backward and, if the guard accepts it, update. Collective.

    Args:
        next_input: gives the global batch; its time is the step's data time.
        wants_stop: this rank's wish to stop after the step.
        checkpoint_seconds: of a save since the last step, for the record.
    """
    started = time.perf_counter()
    random = state.random.capture()
    inputs = next_input()
    loaded = time.perf_counter()
    logged = _compute(state, plan, inputs, hooks)
    computed = time.perf_counter()
    norm = gradient_norm(state.optimizer)
    troubled = any(hook.in_trouble() for hook in hooks)
    agreed = agree(logged, plan, suspected=guard.suspects(norm), stop=wants_stop, trouble=troubled)
    loss = agreed.means[plan.logged[0]]
    verdict = guard.judge(loss, norm, suspected=agreed.suspected, empty=agreed.empty)
    learning_rate = plan.learning_rate(state.step)
    begun_at = state.cursor.consumed_samples
    if verdict.applies:
        _update(state, plan, inputs, hooks, learning_rate=learning_rate, norm=norm)
        guard.accept(loss, norm)
    ended = time.perf_counter()
    times = StepTimes(
        data=loaded - started,
        forward_backward=computed - loaded,
        optimizer=ended - computed,
        total=ended - started,
        checkpoint=checkpoint_seconds,
    )
    result = StepResult(
        step=state.step if verdict.applies else state.step + 1,
        consumed_samples=inputs.cursor.consumed_samples,
        consumed_tokens=inputs.cursor.consumed_samples * plan.seq_length,
        loss=loss,
        num_tokens=agreed.tokens,
        grad_norm=norm,
        learning_rate=learning_rate,
        batch_size=inputs.cursor.consumed_samples - begun_at,
        times=times,
        skipped=not verdict.applies,
        sample_digest=inputs.cursor.rolling_digest,
        skipped_samples=inputs.cursor.skipped_samples,
        extra={name: mean for name, mean in agreed.means.items() if name != plan.logged[0]},
    )
    return Outcome(result, verdict, inputs, random, agreed.stop, agreed.trouble)


def _compute(state: TrainState, plan: StepPlan, inputs: StepInput, hooks: Sequence[Hook]) -> list[dict[str, Tensor]]:
    """Forward and backward between what the hooks do before and after; the device has finished."""
    for hook in hooks:
        hook.before_forward(state, inputs)
    logged = forward_backward(state, plan, inputs)
    for hook in hooks:
        hook.after_backward(state, inputs)
    for hook in hooks:
        logged = hook.checked(state, inputs, logged)
    device_seam.synchronize(plan.device.type)
    return logged


def _update(
    state: TrainState, plan: StepPlan, inputs: StepInput, hooks: Sequence[Hook], *, learning_rate: float, norm: float
) -> None:
    for hook in hooks:
        hook.before_update(state, inputs)
    set_learning_rate(state.optimizer, learning_rate, plan.peak_learning_rate)
    apply_update(state.optimizer, norm)
    state.step, state.cursor = state.step + 1, inputs.cursor


def forward_backward(state: TrainState, plan: StepPlan, inputs: StepInput) -> list[dict[str, Tensor]]:
    """Clear the gradients and take the batch through the schedule; returns what the loss logged, where it is known."""
    zero_gradients(state.chunks)
    state.optimizer.zero_grad()
    return run_schedule(
        state.chunks,
        inputs.micro_batches,
        plan.loss,
        forward_only=False,
        seq_length=plan.seq_length,
        groups=plan.groups,
    )


def agree(logged: list[dict[str, Tensor]], plan: StepPlan, *, suspected: bool, stop: bool, trouble: bool) -> Agreed:
    """The step's only exchange beside its gradients: one all-reduce of a few numbers over all ranks."""
    flags = torch.tensor([float(suspected), float(stop), float(trouble)], dtype=torch.float64, device=plan.device)
    sums = torch.zeros(len(plan.logged), 2, dtype=torch.float64, device=plan.device)
    # Each tp rank of the last pipeline stage holds the same sums: one of them counts.
    if is_last_pipeline_rank(plan.groups) and plan.groups.tp.rank() == 0:
        sums += torch.stack([torch.stack([entry[name] for name in plan.logged]) for entry in logged]).sum(dim=0)
    vector = torch.cat([flags, sums.flatten()])
    dist.all_reduce(vector)
    values: list[float] = vector.tolist()
    pairs = zip(plan.logged, values[3::2], values[4::2], strict=True)
    means = {name: total / count if count else math.nan for name, total, count in pairs}
    tokens = values[4]
    flagged = [value > 0.0 for value in values[:3]]
    return Agreed(means, round(tokens) if math.isfinite(tokens) else 0, tokens == 0.0, *flagged)
