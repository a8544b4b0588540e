"""Numbers about numbers: pass@k, calibration, and how sure a difference between two models is. Arrays in, floats out.

Shapes: N items, C classes, R resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

NUM_BINS = 15
"""As Guo et al., arXiv 1706.04599, who bring the calibration error to networks."""
MIN_ITEMS = 10
"""With fewer, resampling them says little of those that were not drawn."""
POWER_95_80 = 1.959964 + 0.841621
"""Standard errors that a difference must be long to be found 80 times out of 100 at 95 %."""
_CHUNK = 4_000_000


def pass_at_k(samples: NDArray[np.int64], passed: NDArray[np.int64], k: int) -> Numbers:
    """Chance that one of ``k`` samples of each item passes, without bias: 1 - C(n - c, k) / C(n, k).

    Chen et al., arXiv 2107.03374, equation 1.

    Args:
        samples: n [N], each at least ``k``.
        passed: c [N].
    """
    samples, passed = np.asarray(samples, np.int64), np.asarray(passed, np.int64)
    assert k >= 1 and bool((samples >= k).all()), f"pass@{k} needs {k} samples of every item"
    # C(n - c, k) / C(n, k) is the product over i < k of (n - c - i) / (n - i); one of them is 0 where n - c < k.
    steps = np.arange(k)[:, None]
    factors = (samples - passed - steps) / (samples - steps)
    return np.asarray(1.0 - factors.prod(axis=0), np.float64)


class Reliability(NamedTuple):
    """Confidence against correctness by bins of equal width; empty bins are 0. Each [bins]."""

    counts: Numbers
    confidence: Numbers
    accuracy: Numbers

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of the two, over the items; NaN without any."""
        total = self.counts.sum()
        return float((self.counts * np.abs(self.confidence - self.accuracy)).sum() / total) if total else math.nan


def reliability(confidence: Numbers, correct: Numbers, bins: int = NUM_BINS) -> Reliability:
    """Bins of ``confidence`` [N] in (0, 1], each open below and closed above, against ``correct`` [N] of 0 and 1."""
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins).astype(np.float64)
    divisor = np.maximum(counts, 1.0)
    return Reliability(
        counts,
        np.bincount(places, confidence, bins) / divisor,
        np.bincount(places, np.asarray(correct, np.float64), bins) / divisor,
    )


def brier(probabilities: Numbers, answers: NDArray[np.int64]) -> Numbers:
    """Sum over the classes of the squared distance from what is right, in 0 to 2: [N].

    Args:
        probabilities: [N, C].
        answers: right class of each, [N].
    """
    right = np.zeros_like(probabilities)
    right[np.arange(len(answers)), answers] = 1.0
    return np.asarray(np.square(probabilities - right).sum(axis=1), np.float64)


class Difference(NamedTuple):
    """What a second model has more than a first one on the same items.

    Attributes:
        first, second: their values.
        low, high: of the interval around ``second - first``.
        detectable: the smallest difference that these items would most often (80 %) have shown; NaN where the two do
            not differ on any, which says nothing of how they differ.
        items: N.
    """

    first: float
    second: float
    low: float
    high: float
    detectable: float
    items: int

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out, with enough items for it to mean something."""
        return self.items >= MIN_ITEMS and (self.low > 0.0 or self.high < 0.0)


def paired_bootstrap(
    first: Numbers,
    second: Numbers,
    weights: Numbers | None = None,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Interval of the difference of two means over the same items, by resampling the items (Efron's percentiles).

    Args:
        first, second: [N], of each item; with ``weights`` sums over so many things (nats over tokens), whose mean is
            the sum of all sums over the sum of all weights.
        weights: [N]; 1 each by default.
        seed: the same items, seed and ``resamples`` give the same interval.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    weights = np.ones_like(first) if weights is None else np.asarray(weights, np.float64)
    assert len(first) == len(second) == len(weights) > 0, "the same items, and some"
    random = np.random.default_rng(seed)
    size, found = len(first), np.empty(resamples)
    step, change = max(1, _CHUNK // size), second - first
    for start in range(0, resamples, step):
        drawn = random.integers(0, size, (min(step, resamples - start), size))
        found[start : start + step] = change[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(found, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    total, deviation = weights.sum(), float(found.std(ddof=1))
    return Difference(
        float(first.sum() / total),
        float(second.sum() / total),
        float(low),
        float(high),
        POWER_95_80 * deviation if deviation > 0.0 else math.nan,
        size,
    )
