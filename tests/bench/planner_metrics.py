"""Errors of predictions against measurements, as arithmetic: nothing here knows a model or a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

GIB = 2**30
Item = TypeVar("Item")


class Pair(NamedTuple):
    """What was predicted and what was measured, in one unit."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted / self.measured - 1


class Errors(NamedTuple):
    """Absolute relative errors in percent; ``bias`` has its sign."""

    mean: float
    worst: float
    bias: float
    rows: int


class Verdicts(NamedTuple):
    """How well "fits" is told from out of memory.

    Attributes:
        false_fit: runs that went out of memory among those called "fits", in percent.
        false_oom: runs that went well among them those not called "fits", in percent.
        fits: runs called "fits".
        ok, oom: runs of either kind.
    """

    false_fit: float
    false_oom: float
    fits: int
    ok: int
    oom: int


class Regret(NamedTuple):
    """What choosing by prediction costs.

    Attributes:
        mean, worst: how much longer the step of the layout with the shortest prediction is than the shortest measured
            one, in percent, over the groups.
        groups: choices that were to be made.
    """

    mean: float
    worst: float
    groups: int


def within(pairs: Sequence[Pair], *, absolute: float, relative: float) -> float | None:
    """Share of pairs that differ by no more than either bound; None of no pairs."""
    if not pairs:
        return None
    good = [abs(pair.predicted - pair.measured) <= max(absolute, relative * pair.measured) for pair in pairs]
    return sum(good) / len(good)


def errors(pairs: Sequence[Pair]) -> Errors | None:
    """Mean and worst of the pairs; None of no pairs."""
    if not pairs:
        return None
    found = [100 * pair.error for pair in pairs]
    sizes = [abs(error) for error in found]
    return Errors(statistics.fmean(sizes), max(sizes), statistics.fmean(found), len(found))


def verdicts(runs: Sequence[tuple[str, bool]]) -> Verdicts | None:
    """(verdict, whether the run went out of memory) of every run; "tight" counts as not fitting. None of no runs."""
    if not runs:
        return None
    fits = [oom for verdict, oom in runs if verdict == "fits"]
    went_well = [verdict for verdict, oom in runs if not oom]
    missed = sum(verdict != "fits" for verdict in went_well)
    return Verdicts(
        100 * sum(fits) / len(fits) if fits else 0.0,
        100 * missed / len(went_well) if went_well else 0.0,
        len(fits),
        len(went_well),
        len(runs) - len(went_well),
    )


def regret(items: Sequence[Item], group: Callable[[Item], Hashable], pair: Callable[[Item], Pair]) -> Regret | None:
    """Regret of the shortest prediction in every group of at least two items; None without such a group."""
    groups: dict[Hashable, list[Pair]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(pair(item))
    found = []
    for pairs in groups.values():
        if len(pairs) > 1:
            chosen = min(pairs, key=lambda one: one.predicted)
            found.append(100 * (chosen.measured / min(one.measured for one in pairs) - 1))
    return Regret(statistics.fmean(found), max(found), len(found)) if found else None


def leave_one_out(items: Sequence[Item], predict: Callable[[Sequence[Item], Item], Pair]) -> list[Pair]:
    """``predict(the others, item)`` of every item."""
    return [predict([other for other in items if other is not item], item) for item in items]
