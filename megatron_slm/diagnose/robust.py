"""Statistics that a few wild steps do not move: medians, deviations without the trend, shares, ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from megatron_slm.train.guard import NORMAL_DEVIATIONS

MEDIAN_ERROR = math.sqrt(math.pi / 2.0)
"""Standard error of a median over that of a mean, of normal values."""


class Change(NamedTuple):
    """Medians of an early and a late part of a series, and the standard error of their difference."""

    early: float
    late: float
    error: float

    @property
    def gain(self) -> float:
        """Late less early."""
        return self.late - self.early

    @property
    def errors(self) -> float:
        """The difference in standard errors; 0 where nothing moved."""
        if self.gain == 0.0:
            return 0.0
        return self.gain / self.error if self.error else math.copysign(math.inf, self.gain)


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float(statistics.median(values))


def deviation(values: Sequence[float]) -> float:
    """Robust standard deviation of what is left beside the trend; 0 of fewer than two values.

    From differences of neighbours: they hold the noise twice and the trend of one step, which is small.
    """
    steps = [abs(after - before) for before, after in zip(values, values[1:], strict=False)]
    return NORMAL_DEVIATIONS * median(steps) / math.sqrt(2.0) if steps else 0.0


def rolling_medians(values: Sequence[float], width: int) -> list[float]:
    """Of every ``width`` neighbours, the first one of values 0 .. width - 1."""
    return [median(values[start : start + width]) for start in range(len(values) - width + 1)]


def change(early: Sequence[float], late: Sequence[float]) -> Change:
    """Between two parts of one series."""
    noise = median([deviation(early), deviation(late)])
    error = MEDIAN_ERROR * noise * math.sqrt(1.0 / len(early) + 1.0 / len(late))
    return Change(median(early), median(late), error)


def share_above(values: Sequence[float], limit: float) -> float:
    """The share of values above a limit."""
    return sum(value > limit for value in values) / len(values)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho, -1 to 1; 0 where one of the two is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(_ranks(first), _ranks(second))


def differences(values: Sequence[float]) -> list[float]:
    """Of each value from the one before it."""
    return [after - before for before, after in zip(values, values[1:], strict=False)]


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in ascending order; equal values share the mean of theirs."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]
