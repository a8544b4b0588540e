"""Early stopping: the run ends once the held-out loss has not improved for a number of validations."""

from __future__ import annotations

import math
from typing import Any


class EarlyStopping:
    """Remembers the best validation and counts those since. Pure arithmetic: every rank comes to the same answer."""

    def __init__(self, patience: int, record: dict[str, Any] | None = None) -> None:
        """Begin, or go on from the ``record()`` of an earlier part of the run.

        Args:
            patience: validations without a new best after which the run ends. It is not part of the record: a run that
                ended may be continued with more of it.
        """
        self.patience = patience
        self.restore(record)

    def restore(self, record: dict[str, Any] | None) -> None:
        """Forget what was observed since ``record`` was taken; None forgets everything."""
        record = record or {}
        self._best: float = math.inf if record.get("best_loss") is None else float(record["best_loss"])
        self._best_step: int | None = record.get("best_step")
        self._last_step: int = record.get("last_step", -1)
        self._without_best: int = record.get("validations_without_best", 0)

    def observe(self, loss: float, step: int) -> None:
        """Take in a held-out loss in nats; one that is NaN is no improvement. A step seen already does not count."""
        if step <= self._last_step:
            return
        self._last_step = step
        if loss < self._best:
            self._best, self._best_step, self._without_best = loss, step, 0
        else:
            self._without_best += 1

    @property
    def finished(self) -> bool:
        """Whether the run should end."""
        return self._without_best >= self.patience

    def reason(self) -> str:
        """Why it ends, for the log."""
        times = f"{self._without_best} validation{'s' * (self._without_best > 1)}"
        best = "none was finite" if self._best_step is None else f"it was {self._best:.6f} at step {self._best_step}"
        return f"early stopping at step {self._last_step}: {times} without a new best held-out loss; {best}"

    def record(self) -> dict[str, Any]:
        """What a resume needs, as JSON values."""
        return {
            "best_loss": self._best if math.isfinite(self._best) else None,
            "best_step": self._best_step,
            "last_step": self._last_step,
            "validations_without_best": self._without_best,
        }
