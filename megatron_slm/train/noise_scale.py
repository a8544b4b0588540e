"""A hook that measures the gradient noise scale: how large a batch still pays (McCandlish et al., arXiv 1812.06162).

The simple noise scale is tr(Sigma) / |G|^2, Sigma the covariance of one sample's gradient and G the true gradient. Two
squared gradient norms of different batch sizes give unbiased estimates of both (appendix A.1); each is very noisy, and
their ratio is biased, so both are averaged over measurements before they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.optimizer import gradient_norm
from megatron_slm.train.step import StepInput, StepPlan, TrainState, forward_backward

RECORD = "noise_scale"
DECAY = 0.95
"""Of the averages, a measurement: they reach back over about twenty."""


class Estimate(NamedTuple):
    """Unbiased estimates of one measurement, or averages of them."""

    gradient_squared: float
    """|G|^2 of the true gradient; a single estimate may be negative."""
    trace: float
    """tr(Sigma) of one sample's gradient."""

    @property
    def noise_scale(self) -> float:
        """tr(Sigma) / |G|^2 in samples; NaN while the gradient cannot be told from its noise."""
        return self.trace / self.gradient_squared if self.gradient_squared > 0.0 else math.nan


def estimate(small: tuple[int, float], big: tuple[int, float]) -> Estimate:
    """Estimates from two batches, each as (samples, squared norm of its mean gradient); the first is the smaller.

    E |G_B|^2 = |G|^2 + tr(Sigma) / B holds for each, also when the small batch is a part of the big one.
    """
    (small_size, small_squared), (big_size, big_squared) = small, big
    assert 0 < small_size < big_size, f"two batches of {small_size} and {big_size} samples tell no noise"
    return Estimate(
        gradient_squared=(big_size * big_squared - small_size * small_squared) / (big_size - small_size),
        trace=(small_squared - big_squared) / (1.0 / small_size - 1.0 / big_size),
    )


class Average:
    """Exponential averages of estimates, kept as the JSON values of a checkpoint."""

    def __init__(self, record: dict[str, float] | None) -> None:
        self.record = dict(record or {"gradient_squared": 0.0, "trace": 0.0, "weight": 0.0})

    def add(self, new: Estimate) -> None:
        """Take in one measurement."""
        for key, value in (*new._asdict().items(), ("weight", 1.0)):
            self.record[key] = DECAY * self.record[key] + (1.0 - DECAY) * value

    def estimate(self) -> Estimate:
        """The averages, without the pull of the zeros they began with."""
        weight = self.record["weight"]
        return Estimate(self.record["gradient_squared"] / weight, self.record["trace"] / weight)


class NoiseScale(Hook):
    """Measures every ``interval`` steps: takes the first micro-batch of every rank through the model once more.

    The small batch is that micro-batch on all data-parallel ranks (the first ``pp`` of them where pipelines
    interleave: their schedule takes no fewer), the big one is the whole step. What the step itself computes stays the
    same to the last bit. The averages are kept in ``state.records``, so the hook comes before the one that saves.
    """

    def __init__(self, interval: int, plan: StepPlan, write: Callable[[dict[str, Any]], None] | None) -> None:
        """Measure nothing yet; ``write`` takes the record of a measurement, on the rank that logs."""
        self._interval, self._plan, self._write = interval, plan, write
        self._small: tuple[int, float] | None = None
        self._big_size = 0

    def before_forward(self, state: TrainState, inputs: StepInput) -> None:
        """Take the gradient of the small batch; the step clears it again."""
        self._small = None
        groups = self._plan.groups
        count = groups.pp.size() if len(state.chunks) > 1 else 1
        # A batch that still ramps up may be too small to compare with.
        if (state.step + 1) % self._interval or count >= len(inputs.micro_batches):
            return
        width = inputs.micro_batches[0]["tokens"].shape[0] * groups.dp.size()
        random = state.random.capture()
        forward_backward(state, self._plan, inputs._replace(micro_batches=inputs.micro_batches[:count]))
        self._small = count * width, gradient_norm(state.optimizer) ** 2
        self._big_size = len(inputs.micro_batches) * width
        state.random.restore(random)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Compare with the gradient of the whole step and report. A step that was rejected is not measured."""
        small, self._small = self._small, None
        if small is None or result.skipped or not math.isfinite(small[1]):
            return
        new = estimate(small, (self._big_size, result.grad_norm**2))
        average = Average(state.records.get(RECORD))
        average.add(new)
        state.records[RECORD] = average.record
        if self._write is not None:
            where = {"step": result.step, "consumed_samples": result.consumed_samples}
            self._write(where | {RECORD: noise_record(new, average.estimate(), self._plan.seq_length)})


def noise_record(new: Estimate, averaged: Estimate, seq_length: int) -> dict[str, float]:
    """This measurement's estimates, their averages, and the noise scale of the averages in samples and in tokens."""
    return {
        "gradient_squared": new.gradient_squared,
        "trace": new.trace,
        "average_gradient_squared": averaged.gradient_squared,
        "average_trace": averaged.trace,
        "samples": averaged.noise_scale,
        "tokens": averaged.noise_scale * seq_length,
    }
