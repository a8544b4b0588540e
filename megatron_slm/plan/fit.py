"""Constants of the cost model from measurements: a search that needs no derivative and no further library. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from megatron_slm.plan.rates import Rates

FIRST_STEP, LAST_STEP = 0.2, 0.005
"""Relative change of a constant that is tried first, and the one at which the search ends."""

LARGEST_EFFICIENCY = 1.0


def fitted(rates: Rates, names: Sequence[str], loss: Callable[[Rates], float], *, provenance: str) -> Rates:
    """The rates near ``rates`` with the smallest loss, found by moving one constant after the other.

    Args:
        rates: where the search begins; constants that are not in ``names`` stay.
        names: constants to move.
        loss: what is to be small, for example the mean of absolute logarithms of predicted over measured seconds.
        provenance: of the moved constants.

    Returns:
        The rates with the new provenance.
    """
    least, step = loss(rates), FIRST_STEP
    while step >= LAST_STEP:
        moved = False
        for name in names:
            for factor in (math.exp(step), math.exp(-step)):
                changed = getattr(rates, name) * factor
                if name.endswith("_efficiency") and changed > LARGEST_EFFICIENCY:
                    continue
                other = dataclasses.replace(rates, **{name: changed})
                if (found := loss(other)) < least:
                    rates, least, moved = other, found, True
                    break
        step = step if moved else step / 2
    return dataclasses.replace(rates, provenance={**rates.provenance, **dict.fromkeys(names, provenance)})


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and seconds per unit of ``seconds = alpha + beta x size``, in the least relative squares.

    Neither is below zero: a negative latency becomes 0 and the slope is fitted alone.
    """
    weights = [1.0 / value**2 for value in seconds]
    total = sum(weights)
    mean_x = sum(weight * x for weight, x in zip(weights, sizes, strict=True)) / total
    mean_y = sum(weight * y for weight, y in zip(weights, seconds, strict=True)) / total
    spread = sum(weight * (x - mean_x) ** 2 for weight, x in zip(weights, sizes, strict=True))
    both = sum(weight * (x - mean_x) * (y - mean_y) for weight, x, y in zip(weights, sizes, seconds, strict=True))
    beta = both / spread if spread > 0 else 0.0
    alpha = mean_y - beta * mean_x
    if alpha >= 0 and beta > 0:
        return alpha, beta
    squares = sum(weight * x * x for weight, x in zip(weights, sizes, strict=True))
    return 0.0, sum(weight * x * y for weight, x, y in zip(weights, sizes, seconds, strict=True)) / squares


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """10th and 90th, by the nearest rank."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], ordered[round(0.9 * last)]
