"""What the loop tells others: the named result of a step, and the hooks through which everything else takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.errors import UserError


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
    """Mean of the stage's loss over ``num_tokens``, on every rank; of pretraining the cross-entropy in nats."""
    num_tokens: int
    """What the loss of this step is the mean over: tokens, or of some stages pairs or sequences."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    """The rate this update was made with."""
    batch_size: int
    """Samples of this step."""
    times: StepTimes
    skipped: bool
    """The update was not applied: the guard has rejected the batch."""
    sample_digest: str
    """Rolling digest of every sample trained on so far: equal for every layout."""
    skipped_samples: int = 0
    """Samples passed over by roll-backs since step 0; they count in ``consumed_samples``."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Means of what the stage logs beside its loss."""


class Part(Protocol):
    """Tensors that a checkpoint holds beside model and optimizer, by a name of their own."""

    def sharded_state(self, models: dict[str, Any]) -> dict[str, Any]:
        """Core's sharded tensors, to be saved or to be filled; collective.

        Args:
            models: sharded state of the model's chunks, as core names them.
        """

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over what ``sharded_state`` has asked for."""


class OfRank:
    """Marks a part whose tensors belong to the ranks of one layout: under another it is not loaded."""


class Hook:
    """Called by the loop on every rank that was given it. Each call does nothing unless a hook defines it.

    ``state`` is the loop's ``TrainState``; a hook reads it. A call that is collective must be given to every rank.
    """

    def before_run(self, state: Any) -> None:
        """Once, before the first step; a checkpoint has been loaded by then."""

    def before_step(self, state: Any, step: int) -> None:
        """Before update ``step`` (counted from 1) reads its data."""

    def before_forward(self, state: Any, inputs: Any) -> None:
        """With the step's ``StepInput``, before its forward pass. Random states must be left as they were."""

    def after_backward(self, state: Any, inputs: Any) -> None:
        """When forward and backward are over and the gradients reduced, before anybody has judged them."""

    def checked(self, state: Any, inputs: Any, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """After every hook's ``after_backward``: may make forward and backward again, and raise a ``UserError``.

        Args:
            logged: what the loss has logged, where it is known.

        Returns:
            The same, or that of the pass whose gradients are left in the buffers.
        """
        return logged

    def before_update(self, state: Any, inputs: Any) -> None:
        """When the gradients are accepted: reduced, not clipped, in the optimizer's own tensors."""

    def after_step(self, state: Any, result: StepResult) -> None:
        """After every update, applied or skipped."""

    def after_save(self, state: Any, checkpoint: Path) -> None:
        """After a checkpoint was published as ``checkpoint``."""

    def after_run(self, state: Any, code: int) -> None:
        """Once, when the run ends in order; ``code`` is the exit code it will have: 0 target reached, 75 stopped."""

    def in_trouble(self) -> bool:
        """Whether work in the background has failed on this rank. Asked in every step; it costs no exchange."""
        return False

    def on_trouble(self, state: Any) -> None:
        """On every rank, once one of them is in trouble: raises a ``UserError`` if this hook is the one."""

    def finished(self) -> bool:
        """Whether the run has reached its end before ``train_iters``; must be the same on every rank."""
        return False

    def settle(self) -> None:
        """Wait for what runs in the background: before a roll-back, and before the run ends with an error."""

    def on_error(self, state: Any, error: UserError) -> None:
        """When the run ends with an error; ``after_run`` is not called then. Must not raise and not exchange."""

    def rewind(self, state: Any) -> None:
        """After a roll-back: ``state`` is the checkpoint's, and steps after it will be made again."""
