"""The learning-rate range test (Smith, arXiv 1506.01186): raise the rate exponentially and see where the loss falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.errors import ConfigError
from megatron_slm.train.metrics import finite

MIN_STEPS = 20
SMOOTHING_SHARE = 20
"""The mean is taken over a 20th of the test: at most a third of a decade of a range of seven."""
DIVERGED = 4.0
"""Times the best smoothed loss: beyond it nothing is to be learned."""


@dataclass(frozen=True)
class LearningRateRange:
    """From ``low`` to ``high`` over ``steps`` updates, by the same factor each time."""

    low: float
    high: float
    steps: int

    @classmethod
    def parse(cls, text: str, steps: int) -> LearningRateRange:
        """Read LOW:HIGH.

        Raises:
            ConfigError: it is no range, or there are too few steps for a curve.
        """
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            raise ConfigError(f"--lr-range-test {text} is no LOW:HIGH; two rates are needed, such as 1e-7:1.") from None
        if not 0.0 < low < high < math.inf:
            raise ConfigError(f"--lr-range-test {text}: LOW must be above 0 and HIGH above LOW, such as 1e-7:1.")
        if steps < MIN_STEPS:
            raise ConfigError(
                f"train.train_iters = {steps}: a learning-rate range test needs at least {MIN_STEPS} steps, better 100."
            )
        return cls(low, high, steps)

    def learning_rate(self, step: int) -> float:
        """Rate of the update that follows ``step`` updates."""
        return float(self.low * (self.high / self.low) ** (step / (self.steps - 1)))

    @property
    def window(self) -> int:
        """Steps of the mean that smooths the curve; odd."""
        return (self.steps // SMOOTHING_SHARE) | 1


@dataclass
class Curve:
    """Rate and loss of every step so far. A step's loss is that of the weights its own update has not changed yet."""

    window: int
    learning_rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _best: float = math.inf

    def add(self, learning_rate: float, loss: float) -> bool:
        """Note a step; returns whether the test is over, because the loss is not finite or has risen too far."""
        if not math.isfinite(loss):
            return True
        self.learning_rates.append(learning_rate)
        self.losses.append(loss)
        if len(self.losses) < self.window:
            return False
        recent = sum(self.losses[-self.window :]) / self.window
        self._best = min(self._best, recent)
        return recent > DIVERGED * self._best

    @property
    def smoothed(self) -> list[float]:
        """Centred mean of each loss and its neighbours, fewer at the ends: it does not lag behind the rate."""
        return [float(value) for value in centred_mean(self.losses, self.window)]


@dataclass(frozen=True)
class Suggestion:
    """Two rules of thumb for a peak learning rate."""

    steepest: float
    """Where the smoothed loss falls fastest against the logarithm of the rate."""
    tenth: float
    """A tenth of where it is lowest, and never below the range."""


def suggest(curve: Curve) -> Suggestion | None:
    """What the curve says; None where the loss never falls."""
    # The ends, where the mean is over fewer steps, would win by their noise alone.
    inner = slice(curve.window // 2, len(curve.losses) - curve.window // 2)
    smoothed, rates = np.array(curve.smoothed[inner]), curve.learning_rates[inner]
    lowest = int(smoothed.argmin()) if len(smoothed) else 0
    if lowest == 0:
        return None
    slopes = np.gradient(smoothed, np.log(rates))[: lowest + 1]
    steepest = int(slopes.argmin())
    return Suggestion(steepest=rates[steepest], tenth=max(curve.learning_rates[0], rates[lowest] / 10.0))


def centred_mean(values: Sequence[float], window: int) -> np.ndarray:
    """[N] values -> [N] means over ``window`` (odd) neighbours; at the ends the reach shrinks on both sides at once."""
    half, count = window // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(half, np.minimum(np.arange(count), count - 1 - np.arange(count)))
    stops, starts = np.arange(count) + reach + 1, np.arange(count) - reach
    return np.asarray((sums[stops] - sums[starts]) / (stops - starts))


def range_record(span: LearningRateRange, curve: Curve, suggestion: Suggestion | None) -> dict[str, Any]:
    """What ``lr_range_test.json`` holds: the range, the curve by step (from 1) and the suggestions."""
    return {
        "low": span.low,
        "high": span.high,
        "train_iters": span.steps,
        "smoothing_steps": curve.window,
        "steps": list(range(1, len(curve.losses) + 1)),
        "learning_rates": curve.learning_rates,
        "losses": [finite(loss) for loss in curve.losses],
        "smoothed_losses": curve.smoothed,
        "suggestion": None
        if suggestion is None
        else {"steepest": suggestion.steepest, "minimum_over_10": suggestion.tenth},
    }


def draw(curve: Curve, suggestion: Suggestion | None, title: str, output: Path) -> None:
    """Write the picture: the loss against the rate, and the suggestions."""
    from matplotlib.figure import Figure  # a second of import, on the one rank that draws

    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    rates, smoothed = curve.learning_rates, curve.smoothed
    axes.plot(rates, curve.losses, color="#1f77b4", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(rates, smoothed, color="#1f77b4", linewidth=1.8, label=f"mean of {curve.window} steps")
    if suggestion is not None:
        marks = (
            ("steepest descent", suggestion.steepest, "#d62728"),
            ("minimum / 10", suggestion.tenth, "#2ca02c"),
        )
        for name, rate, colour in marks:
            axes.axvline(rate, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {rate:.1e}")
    # A loss that explodes at the end would flatten everything that was worth seeing.
    lowest, first = min(smoothed), smoothed[0]
    axes.set_ylim(lowest - 0.1 * (first - lowest + 0.1), first + 0.5 * (first - lowest + 0.1))
    axes.set_xscale("log")
    axes.set_title(title)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(output, dpi=150)
