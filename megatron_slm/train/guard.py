"""Judges every step before its update is applied: is the loss finite, is it a spike, and what is to be done?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.train.config import TrainConfig

NORMAL_DEVIATIONS = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

SMALLEST_RELATIVE_DEVIATION = 1e-3
"""Of the median: on a plateau the deviation of a window may vanish, and every step would be a spike."""


@dataclass(frozen=True)
class Verdict:
    """What the guard says of a step."""

    kind: str
    """"good", "empty", "non-finite" or "spike"."""
    reason: str = ""
    """One clause with the value and what it was compared with."""
    policy: str = "apply"
    """"apply", "warn", "stop", "skip" or "rollback"."""

    @property
    def applies(self) -> bool:
        """Whether the update may be made."""
        return self.policy in ("apply", "warn")


class Guard:
    """Keeps the losses and gradient norms of the steps that were applied; equal on every rank.

    A spike is a value more than ``spike_threshold`` robust standard deviations above the median of the last
    ``spike_window`` applied steps: of the loss itself, and of the logarithm of the gradient norm, whose distribution is
    wide to the right.
    """

    def __init__(self, config: TrainConfig, record: dict[str, Any] | None = None) -> None:
        self._config = config
        stored = record or {}
        self._losses: list[float] = list(stored.get("losses", []))
        self._norms: list[float] = list(stored.get("norms", []))
        self.interventions: int = stored.get("interventions", 0)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as the uninterrupted one."""
        return {"losses": list(self._losses), "norms": list(self._norms), "interventions": self.interventions}

    def suspects(self, grad_norm: float) -> bool:
        """Whether this rank's gradient norm is not finite; one rank's suspicion is every rank's."""
        return not math.isfinite(grad_norm)

    def judge(self, loss: float, grad_norm: float, *, suspected: bool, empty: bool = False) -> Verdict:
        """Of a step whose update has not been applied yet.

        Args:
            suspected: some rank's gradient norm is not finite.
            empty: nothing of the global batch counts, so that there is no loss.
        """
        if empty:
            reason = "nothing of the batch counts: every label is masked, or no answer has a score"
            return Verdict("empty", reason, "skip")
        if suspected or not math.isfinite(loss):
            reason = f"the loss is {loss:g}, the gradient norm {grad_norm:g}"
            return Verdict("non-finite", reason, self._config.non_finite_policy)
        if self._config.spike_policy == "off":
            return Verdict("good")
        found = self._spike("loss", self._losses, loss)
        if not found and grad_norm > 0.0:
            found = self._spike("logarithm of the gradient norm", self._norms, math.log(grad_norm))
        return Verdict("spike", found, self._config.spike_policy) if found else Verdict("good")

    def accept(self, loss: float, grad_norm: float) -> None:
        """Note an applied step."""
        window = self._config.spike_window
        self._losses = [*self._losses, loss][-window:]
        if grad_norm > 0.0:
            self._norms = [*self._norms, math.log(grad_norm)][-window:]

    def rewind(self, record: dict[str, Any] | None) -> None:
        """Forget the steps after a checkpoint, but not what has been done since: that stays bounded."""
        restored = Guard(self._config, record)
        self._losses, self._norms = restored._losses, restored._norms

    def exhausted(self) -> bool:
        """Whether the run has used up its interventions."""
        return self.interventions >= self._config.max_interventions

    def _spike(self, name: str, window: Sequence[float], value: float) -> str:
        if len(window) < self._config.spike_window:
            return ""
        median = statistics.median(window)
        deviation = NORMAL_DEVIATIONS * statistics.median(abs(other - median) for other in window)
        deviation = max(deviation, SMALLEST_RELATIVE_DEVIATION * abs(median))
        if value <= median + self._config.spike_threshold * deviation:
            return ""
        above = (value - median) / deviation if deviation else math.inf
        return (
            f"the {name} is {value:.4f}, {above:.1f} robust standard deviations above {median:.4f}, the median of the "
            f"last {len(window)} steps"
        )
