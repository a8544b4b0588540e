"""Finds where the first value that is not finite came from: rank, micro-batch, module and samples.

What is at rest is looked at first: weights, optimizer states and inputs. If they are finite, the step is run again from
its own random states with every module and every node of the autograd graph watched (``attribution_trace.py``). The
ranks' findings are gathered, and the one that comes first in causal order is the origin. Nothing is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader, positions_of
from megatron_slm.parallel.gradients import zero_gradients
from megatron_slm.train.attribution_event import REDUCTION, Event
from megatron_slm.train.attribution_state import bad_gradients, bad_inputs, bad_state, largest_gradient
from megatron_slm.train.attribution_trace import Trace
from megatron_slm.train.intervention import Origin
from megatron_slm.train.step import StepInput, StepPlan, TrainState, forward_backward

AT_REST = ("parameter", "optimizer state")
"""Phases of what the next step would begin with too."""

LARGEST_SQUARES = torch.finfo(torch.float32).max
"""Core adds up the squares of the gradients in fp32."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where the first value of a step that is not finite came from. Equal on every rank.

    Attributes:
        rank, coordinates: where it was found first; the coordinates as "tp 1, pp 0, dp 1", with
            cp behind tp where there is more than one.
        micro_batch: of that rank, counted from 0; None where all are concerned.
        phase: "parameter", "optimizer state", "input", "forward", "backward", "reduction", or "gradient norm" where
            every value is finite and only their norm is not.
        module: global name, layers counted from 0 over the whole model: ``decoder.layers.3.mlp.linear_fc2``.
        tensor: what of the module: "output", "weight", "exp_avg of the weight", "gradient of the input" ...
        nonfinite, total: elements of that tensor on that rank.
        samples: names of the samples of the micro-batch.
        reproduced: false if the step, run again, was finite everywhere; what is named is then what the fault left.
        others: further ranks, each in a few words.
    """

    rank: int
    coordinates: str
    micro_batch: int | None
    phase: str
    module: str
    tensor: str
    nonfinite: int
    total: int
    samples: tuple[str, ...]
    reproduced: bool
    others: tuple[str, ...]

    def sentence(self, step: int) -> str:
        """What a person reads; ``step`` is the number of the rejected update."""
        also = f" Also: {'; '.join(self.others)}." if self.others else ""
        return self._origin(step) + also

    def _origin(self, step: int) -> str:
        where = f"rank {self.rank} ({self.coordinates})"
        elements = f"{self.nonfinite:,} of {self.total:,} elements of the {self.tensor} of {self.module}"
        samples = f" Its samples: {', '.join(self.samples)}." if self.samples else ""
        if self.phase == "gradient norm":
            return (
                f"Every value of the step is finite, but the squares of its gradients add up to more than fp32 holds; "
                f"the largest gradient is that of {self.module} on {where}."
            )
        if not self.reproduced:
            left = f" It has left {elements} on {where} not finite, nearest to the loss." if self.total else ""
            return (
                f"Step {step}, run again with the same samples and random states, was finite everywhere: the fault was "
                f"transient, a hardware fault or a race is likely.{left}"
            )
        if self.phase == "input" and not self.nonfinite:
            return "No token of the batch counts in the loss: every loss mask is 0."
        if self.phase == "input":
            return (
                f"It is in the data: {self.nonfinite:,} of {self.total:,} elements of {self.tensor} in micro-batch "
                f"{self.micro_batch} of {where} are not finite.{samples}"
            )
        if self.phase == "parameter":
            return f"It is in the weights that step {step} began with: {elements} on {where} are not finite."
        if self.phase == "optimizer state":
            return (
                f"It is in the optimizer state: {elements} on {where} are not finite or negative squares, and the "
                f"update before step {step} has written them into the weights."
            )
        batch = f" of micro-batch {self.micro_batch}" if self.micro_batch is not None else ""
        during = "the reduction of the gradients" if self.phase == "reduction" else f"the {self.phase} pass{batch}"
        return (
            f"It began in {during} on {where}: {elements} are not finite, though everything before them was.{samples}"
        )


class Witness(NamedTuple):
    """One rank and what it has found."""

    rank: int
    coordinates: str
    dp_rank: int
    event: Event | None


class Evidence(NamedTuple):
    """What one rank knows without running the step again."""

    witness: Witness
    bad_gradients: int
    """Parameters with one, of the rejected step."""
    largest: tuple[float, str]
    """Sum of squares and name of the largest gradient."""
    tokens: float
    """Of this rank in the loss."""


def investigation(loader: TrainLoader) -> Callable[[TrainState, StepPlan, StepInput, dict[str, Any]], Origin]:
    """What the loop asks about a step that is not finite: ``attribute``, in words."""

    def investigate(state: TrainState, plan: StepPlan, inputs: StepInput, random_at_start: dict[str, Any]) -> Origin:
        samples_of = partial(sample_names, loader, state.cursor)
        finding = attribute(state, plan, inputs, random_at_start, samples_of=samples_of)
        return Origin(finding.sentence(state.step + 1), lasting=finding.phase in AT_REST)

    return investigate


def sample_names(loader: TrainLoader, cursor: Cursor, micro_batch: int) -> list[str]:
    """The samples of this rank's micro-batch of the step that begins at ``cursor``, in words."""
    positions = positions_of(
        micro_batch,
        consumed_samples=cursor.consumed_samples,
        micro_batch_size=loader.micro_batch_size,
        data_parallel_rank=loader.data_parallel_rank,
        data_parallel_size=loader.data_parallel_size,
    )
    samples = [(position, cursor.order.sample_id(position)) for position in positions]
    return [
        f"position {position} ({sample.source}, epoch {sample.epoch}, sample {sample.index})"
        for position, sample in samples
    ]


def attribute(
    state: TrainState,
    plan: StepPlan,
    inputs: StepInput,
    random_at_start: dict[str, Any],
    *,
    samples_of: Callable[[int], Sequence[str]],
) -> Finding:
    """The origin of a step that was judged not finite, before its update. Collective; costs at most one step.

    Weights, optimizer and random states are left as they were, the gradients cleared.

    Args:
        inputs: of the rejected step.
        random_at_start: random states before it.
        samples_of: names of the samples of this rank's micro-batch of that number.
    """
    at_rest = [*bad_state(state.chunks, state.optimizer, plan.groups), *bad_inputs(inputs.micro_batches)]
    gradients = bad_gradients(state.chunks, REDUCTION, "reduction", "gradient")
    mine = Evidence(
        witness=_witness(plan, at_rest[0] if at_rest else None, samples_of),
        bad_gradients=len(gradients),
        largest=largest_gradient(state.chunks),
        tokens=sum(float(batch["loss_mask"].sum()) for batch in inputs.micro_batches),
    )
    evidence: list[Evidence] = _gathered(mine)
    finding = _origin([each.witness for each in evidence]) or _no_tokens(evidence) or _overflow(evidence)
    if finding is None:
        random = state.random.capture()
        state.random.restore(random_at_start)
        trace = Trace(state.chunks, plan.groups)
        with trace.watching():
            forward_backward(state, plan, inputs)
        state.random.restore(random)
        again = _gathered(_witness(plan, trace.first(), samples_of))
        left = _gathered(_witness(plan, trace.nearest_the_loss(gradients), samples_of))
        finding = _origin(again) or _transient(left, evidence)
    zero_gradients(state.chunks)
    state.optimizer.zero_grad()
    return finding


def _witness(plan: StepPlan, event: Event | None, samples_of: Callable[[int], Sequence[str]]) -> Witness:
    groups = plan.groups
    if event is not None and event.micro_batch is not None:
        event = replace(event, samples=tuple(samples_of(event.micro_batch)))
    shared = f"tp {groups.tp.rank()}" + (f", cp {groups.cp.rank()}" if groups.cp.size() > 1 else "")
    coordinates = f"{shared}, pp {groups.pp.rank()}, dp {groups.dp.rank()}"
    return Witness(dist.get_rank(), coordinates, groups.dp.rank(), event)


def _gathered(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _origin(witnesses: Sequence[Witness]) -> Finding | None:
    """The earliest event in causal order, and every rank that did not merely receive it."""
    found = [(witness, witness.event) for witness in witnesses if witness.event is not None]
    if not found:
        return None
    found.sort(key=lambda pair: (pair[1].order, pair[0].rank))
    (first, event), others, replicas = found[0], [], {found[0][0].dp_rank}
    for witness, other in found[1:]:
        if (other.order, other.module, other.tensor) == (event.order, event.module, event.tensor):
            others.append(f"the same on rank {witness.rank} ({witness.coordinates})")
        elif witness.dp_rank not in replicas and not _follows(other, event):
            batch = f" of micro-batch {other.micro_batch}" if other.micro_batch is not None else ""
            others.append(
                f"on rank {witness.rank} ({witness.coordinates}), independently, the {other.tensor} of {other.module} "
                f"({other.phase}{batch})"
            )
        replicas.add(witness.dp_rank)
    return _finding(first, event, reproduced=True, others=tuple(others))


def _follows(other: Event, event: Event) -> bool:
    """Whether what another replica has found is a consequence of ``event``, the earliest one.

    The reduction of the gradients, and the gathering of weights that a bad optimizer state was written into, are where
    replicas meet.
    """
    if other.order[0] == REDUCTION:
        return event.order[0] != REDUCTION
    return event.phase == "optimizer state" and other.phase == "parameter" and other.module == event.module


def _finding(witness: Witness, event: Event, *, reproduced: bool, others: tuple[str, ...] = ()) -> Finding:
    return Finding(
        rank=witness.rank,
        coordinates=witness.coordinates,
        micro_batch=event.micro_batch,
        phase=event.phase,
        module=event.module,
        tensor=event.tensor,
        nonfinite=event.nonfinite,
        total=event.total,
        samples=event.samples,
        reproduced=reproduced,
        others=others,
    )


def _without_values(witness: Witness, phase: str, module: str, *, reproduced: bool = True) -> Finding:
    """A finding that no single tensor shows."""
    event = Event(order=(), phase=phase, module=module, tensor=module, nonfinite=0, total=0)
    return _finding(witness, event, reproduced=reproduced)


def _no_tokens(evidence: Sequence[Evidence]) -> Finding | None:
    """A batch without a token in the loss: its mean loss is 0 / 0."""
    if any(each.tokens for each in evidence):
        return None
    return _without_values(evidence[0].witness, "input", "loss_mask")


def _overflow(evidence: Sequence[Evidence]) -> Finding | None:
    """Finite gradients whose norm is not."""
    largest = max(evidence, key=lambda each: each.largest[0])
    if any(each.bad_gradients for each in evidence) or sum(each.largest[0] for each in evidence) <= LARGEST_SQUARES:
        return None
    return _without_values(largest.witness, "gradient norm", largest.largest[1])


def _transient(left: Sequence[Witness], evidence: Sequence[Evidence]) -> Finding:
    """A fault that the second run did not show; what the first has left behind is the only trace of it."""
    found = [(witness, witness.event) for witness in left if witness.event is not None]
    if not found:
        return _without_values(left[0], "forward", "", reproduced=False)
    nearest, event = min(found, key=lambda pair: (pair[1].order, pair[0].rank))
    others = tuple(
        f"{each.bad_gradients} parameters with bad gradients on rank {each.witness.rank} ({each.witness.coordinates})"
        for each in evidence
        if each.bad_gradients
    )
    return _finding(nearest, event, reproduced=False, others=others)
