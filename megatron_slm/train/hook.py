"""What the loop tells others: the named result of a step, and the hooks through which everything else takes part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Wall-clock seconds on this rank. ``total`` is the step's; ``checkpoint`` is the pause before it."""

    data: float
    forward_backward: float
    optimizer: float
    total: float
    checkpoint: float = 0.0
    """Between the step before and this one: saving, validating, logging."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; every number is of the global batch unless it says otherwise."""

    step: int
    """Updates made so far, this one included: the first step of a run is 1."""
    consumed_samples: int
    """Samples read since step 0, this step included."""
    consumed_tokens: int
    """Tokens read since step 0, masked ones included: samples x seq_length."""
    loss: float
    """Mean cross-entropy in nats over ``num_tokens``; NaN on a rank where the model does not end."""
    num_tokens: int
    """Tokens of this step that count in the loss; 0 where the loss is not known."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    """The rate this update was made with."""
    batch_size: int
    """Samples of this step."""
    times: StepTimes
    skipped: bool
    """The update was not applied (a gradient was not finite)."""
    sample_digest: str
    """Rolling digest of every sample consumed so far: equal for every layout."""


class Hook:
    """Called by the loop on every rank that was given it. Each call does nothing unless a hook defines it.

    ``state`` is the loop's ``TrainState``; a hook reads it. A call that is collective must be given to every rank.
    """

    def before_run(self, state: Any) -> None:
        """Once, before the first step; a checkpoint has been loaded by then."""

    def before_step(self, state: Any, step: int) -> None:
        """Before update ``step`` (counted from 1) reads its data."""

    def after_step(self, state: Any, result: StepResult) -> None:
        """After every update, applied or skipped."""

    def after_save(self, state: Any, checkpoint: Path) -> None:
        """After a checkpoint was published as ``checkpoint``."""

    def after_run(self, state: Any, code: int) -> None:
        """Once, when the run ends in order; ``code`` is the exit code it will have: 0 target reached, 75 stopped."""
