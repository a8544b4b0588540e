"""What is done about a step that the guard rejects: say it, stop, skip the batch, or roll back. Always bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_slm.errors import CheckpointError, NonFiniteError, SpikeError, UserError
from megatron_slm.train.guard import Guard
from megatron_slm.train.hook import Hook
from megatron_slm.train.step import Outcome, StepInput, StepPlan, TrainState


class Origin(NamedTuple):
    """Where a value that is not finite came from."""

    sentence: str
    lasting: bool
    """It is in the weights or the optimizer, so that every further step begins with it."""


@dataclass(frozen=True)
class Interventions:
    """The three things an intervention needs that only the composition of a run knows.

    Attributes:
        warn: writes a line into the run's log; nothing on ranks without one.
        investigate: names the origin of a value that is not finite, by running the step again; collective.
        roll_back: loads the newest checkpoint into the state and returns where it was read from; collective. None where
            there is no checkpoint; raises a CheckpointError on every rank where none is whole.
    """

    warn: Callable[[str], None]
    investigate: Callable[[TrainState, StepPlan, StepInput, dict[str, Any]], Origin]
    roll_back: Callable[[TrainState], str | None]

    def take(self, state: TrainState, plan: StepPlan, outcome: Outcome, guard: Guard, hooks: Sequence[Hook]) -> bool:
        """Do what the verdict's policy says. Collective.

        Returns:
            Whether the step counts: false after a roll-back, which makes it never have happened.

        Raises:
            NonFiniteError, SpikeError: the policy is to stop, or the interventions of the run are used up.
        """
        verdict, result = outcome.verdict, outcome.result
        if verdict.kind == "good":
            return True
        what = f"step {result.step}: {verdict.reason} (learning rate {result.learning_rate:g})."
        if verdict.policy == "warn":
            self.warn(f"{what} The update was applied (train.spike_policy=warn).")
            return True
        lasting = False
        if verdict.kind == "non-finite":
            origin = self.investigate(state, plan, outcome.inputs, outcome.random)
            what, lasting = f"{what} {origin.sentence}", origin.lasting
        if verdict.policy == "stop":
            raise _error(outcome, what)
        if guard.exhausted():
            raise _error(outcome, f"{what} The run has used up train.max_interventions = {guard.interventions}.")
        if verdict.policy == "skip" and lasting:
            raise _error(outcome, f"{what} Skipping batches cannot mend that; start again from the newest checkpoint.")
        guard.interventions += 1
        if verdict.policy == "skip":
            state.step, state.cursor = result.step, outcome.inputs.cursor
            self.warn(f"{what} Its batch is skipped (intervention {guard.interventions}).")
            return True
        self._roll_back(state, outcome, what, guard, hooks)
        return False

    def _roll_back(self, state: TrainState, outcome: Outcome, what: str, guard: Guard, hooks: Sequence[Hook]) -> None:
        """Back to the newest checkpoint, on to the data behind the bad batch."""
        for hook in hooks:
            hook.settle()
        bad_end = outcome.inputs.cursor.consumed_samples
        try:
            origin = self.roll_back(state)
        except CheckpointError as error:
            raise _error(outcome, f"{what} It could not be rolled back: {error}") from error
        if origin is None:
            raise _error(outcome, f"{what} There is no checkpoint to roll back to yet.")
        guard.rewind(state.records.get("guard"))
        skipped = bad_end - state.cursor.consumed_samples
        state.cursor = state.cursor.skip(skipped)
        for hook in hooks:
            hook.rewind(state)
        self.warn(
            f"{what} Rolled back to {origin}; the {skipped} samples up to {bad_end} are passed over "
            f"(intervention {guard.interventions})."
        )


def _error(outcome: Outcome, what: str) -> UserError:
    result = outcome.result
    if outcome.verdict.kind == "empty":
        return NonFiniteError(
            f"{what} Nothing of this step was applied. The log names the first answer that could not be scored "
            "(completions/unscored_ratio); mslm data show DIRECTORY tells which tokens of examples are trained."
        )
    first = result.consumed_samples - result.batch_size
    message = (
        f"{what} Nothing of this step was applied. Lower optimizer.lr, set optimizer.clip_grad, choose another "
        "train.non_finite_policy or train.spike_policy, or look at the samples with mslm data inspect (positions "
        f"{first} to {result.consumed_samples - 1})."
    )
    return NonFiniteError(message) if outcome.verdict.kind == "non-finite" else SpikeError(message)
