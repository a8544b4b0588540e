"""The first module, in the order of execution, whose output or gradient is not what one rank has there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_slm.replay.watch import BACKWARD, FORWARD, Place, Watched
from megatron_slm.verify.compare import GRADIENTS, NORM
from megatron_slm.verify.report import Claim
from megatron_slm.verify.slices import held, three_axes
from megatron_slm.verify.tolerance import Unit, kind

Key = tuple[str, str]
"""A module's name and a direction."""

LATENTS = ("linear_q_down_proj", "linear_kv_down_proj", "q_layernorm", "kv_layernorm")
"""Under tp their gradient is this rank's part of a sum (multi-latent attention)."""

GRADIENT, LOSS, UPDATE, RESUME = "gradient", "loss", "update", "resume"


class Seen(Protocol):
    """A rank, and what its modules put out in one step."""

    place: Place
    watched: list[Watched]


class Finding(NamedTuple):
    """Where a run first differs, and in what: a direction of ``replay/watch.py`` or one of the words above."""

    module: str
    direction: str


def first_difference(
    rows: Sequence[Claim],
    plain: Seen,
    perturbed: Sequence[Seen],
    found: Sequence[Seen],
    precision: str,
    *,
    gated: bool,
) -> Finding | None:
    """Where a job with failed claims first differs.

    Args:
        rows: the claims of the run.
        plain, perturbed, found: with watched modules; one rank, the same under rounding errors, the job's ranks.
        gated: the MLP has a gate (its first matrix holds two halves).
    """
    order = execution_order(plain.watched)
    failing = {row.name: row for row in rows if not row.equal}
    if row := failing.get("initial weights"):
        return Finding(first_parameter(row, order, "every weight"), "initial weights")
    wrong = different_modules(plain, perturbed, found, precision, gated=gated)
    if module := next((name for name in order if (name, FORWARD) in wrong), None):
        return Finding(module, FORWARD)
    if any(name.endswith("of step 1") and name not in (GRADIENTS, NORM) for name in failing):
        return Finding("loss", LOSS)
    backward = list(dict.fromkeys(one.name for one in plain.watched if one.direction == BACKWARD))
    first = next((index for index, name in enumerate(backward) if (name, BACKWARD) in wrong), None)
    if first is not None:
        # The gradient of an output is made by who takes it in: the module whose own output's gradient came before.
        return Finding(backward[first - 1] if first else "loss", BACKWARD)
    return _beside_modules(rows, failing, order)


def _beside_modules(rows: Sequence[Claim], failing: dict[str, Claim], order: list[str]) -> Finding | None:
    """What differs where every output and its gradient is right."""
    if row := failing.get(GRADIENTS):
        return Finding(first_parameter(row, order[::-1], "reduction of the gradients"), GRADIENT)
    if NORM in failing:
        return Finding("gradient norm", GRADIENT)
    for name, row in failing.items():
        if name.endswith("after step 1"):
            return Finding(first_parameter(row, order, "optimizer"), UPDATE)
    for row in rows:
        if not row.equal:
            resume = "checkpoint" in row.name
            return Finding("checkpoint" if resume else row.name, RESUME if resume else LOSS)
    return None


def different_modules(
    plain: Seen, perturbed: Sequence[Seen], found: Sequence[Seen], precision: str, *, gated: bool
) -> set[Key]:
    """Modules whose output (or gradient) on some rank is not its part of the one-rank output."""
    whole, unit = Whole.of(plain), Unit(precision)
    noise = [errors_of(whole, [one], gated=gated) for one in perturbed]
    worst: dict[str, float] = {}
    tolerance: dict[Key, float] = {}
    for key in whole.values:
        # Of the modules of a kind that were executed so far: behind a router that has chosen otherwise all is noise.
        of_kind = kind(f"{key[0]} {key[1]}")
        worst[of_kind] = max(worst.get(of_kind, 0.0), *(one.get(key, 0.0) for one in noise))
        tolerance[key] = unit.tolerance(worst[of_kind])
    errors = errors_of(whole, found, gated=gated)
    return {key for key, error in errors.items() if not error <= tolerance.get(key, 0.0)}


class Whole(NamedTuple):
    """What one rank has put out: by module and direction, one tensor [S, B, C] a micro-batch of the global batch."""

    values: dict[Key, list[Tensor]]
    batch: int

    @staticmethod
    def of(plain: Seen) -> Whole:
        """The tensors of a one-rank job."""
        batch = next((one.values.shape[1] for one in plain.watched if one.values.dim() == 3), 1)
        values: dict[Key, list[Tensor]] = {}
        for one in plain.watched:
            values.setdefault((one.name, one.direction), []).append(three_axes(one.values, batch))
        return Whole(values, batch)


def errors_of(whole: Whole, found: Iterable[Seen], *, gated: bool) -> dict[Key, float]:
    """Largest error over the ranks of every module and direction that can be compared, relative."""
    errors: dict[Key, float] = {}
    sums: dict[tuple[Key, int], list[tuple[Place, Watched]]] = {}
    for one in found:
        squares: dict[Key, list[float]] = {}
        for seen in one.watched:
            key, number = (seen.name, seen.direction), seen.micro_batch * one.place.dp_size + one.place.dp
            if key not in whole.values or number >= len(whole.values[key]):
                errors[key] = math.inf
            elif _is_sum(seen):
                sums.setdefault((key, number), []).append((one.place, seen))
            elif (pair := _pair(whole, key, number, seen, one.place, gated=gated)) is not None:
                total = squares.setdefault(key, [0.0, 0.0])
                total[0] += float((pair[0].double() - pair[1].double()).square().sum())
                total[1] += float(pair[1].double().square().sum())
        for key, (away, size) in squares.items():
            errors[key] = max(errors.get(key, 0.0), math.sqrt(away / size) if size else math.inf if away else 0.0)
    for (key, number), parts in sums.items():
        errors[key] = max(errors.get(key, 0.0), _error_of_sum(whole.values[key][number], parts, key[1]))
    return {key: math.inf if math.isnan(error) else error for key, error in errors.items()}


def execution_order(watched: Iterable[Watched]) -> list[str]:
    """Names of the watched modules in the order in which they ended their first forward pass."""
    return list(dict.fromkeys(one.name for one in watched if one.direction == FORWARD))


def _is_sum(seen: Watched) -> bool:
    """The output layer ends in sums over the tokens of a cp rank."""
    return seen.values.dim() == 1 or (
        seen.name.rpartition("mtp.")[2].startswith("output_layer") and seen.direction == FORWARD
    )


def _pair(
    whole: Whole, key: Key, number: int, seen: Watched, place: Place, *, gated: bool
) -> tuple[Tensor, Tensor] | None:
    """What a rank has and what it should have; None where that is not known."""
    mine = three_axes(seen.values, whole.batch)
    if key[1] == BACKWARD and place.tp_size > 1 and key[0].endswith(LATENTS):
        return None
    name = key[0].rpartition(".")[2]
    should = held(whole.values[key][number], mine.shape, place, gated=gated and name == "linear_fc1")
    return None if should is None else (mine, should)


def _error_of_sum(expected: Tensor, parts: list[tuple[Place, Watched]], direction: str) -> float:
    """Error of sums over tokens: those of cp ranks add up; their gradient is the same on each."""
    scale = float(expected.double().norm()) or 1.0
    if direction == BACKWARD:
        return max(float((seen.values.double() - expected.double()).norm()) / scale for _, seen in parts)
    totals: dict[tuple[int, int], Tensor] = {}
    for place, seen in parts:
        key = (place.tp, place.dp)
        totals[key] = totals.get(key, torch.zeros_like(expected, dtype=torch.float64)) + seen.values.double()
    return max(float((total - expected.double()).norm()) / scale for total in totals.values())


def first_parameter(row: Claim, order: list[str], everything: str) -> str:
    """The module of the failing parameter that comes first in ``order``; ``everything`` where all of them fail."""
    if row.all_fail and len(row.failing) > 1:
        return everything
    modules = [name.partition("[")[0].rpartition(".")[0] for name in row.failing]

    def position(module: str) -> int:
        """Of the innermost watched module that holds it."""
        holders = [index for index, name in enumerate(order) if module == name or module.startswith(f"{name}.")]
        return max(holders, key=lambda index: len(order[index]), default=len(order))

    return min(modules, key=position, default=everything)
