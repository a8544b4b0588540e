"""What is done about a step that the guard rejects: say it, stop, skip the batch, or roll back. Always bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.errors import NonFiniteError, SpikeError, UserError
from megatron_slm.train.guard import Guard
from megatron_slm.train.hook import Hook
from megatron_slm.train.step import Outcome, StepInput, StepPlan, TrainState


@dataclass(frozen=True)
class Interventions:
    """The three things an intervention needs that only the composition of a run knows.

    Attributes:
        warn: writes a line into the run's log; nothing on ranks without one.
        investigate: names the origin of a value that is not finite, by running the step again; collective. None where
            it cannot be named.
        roll_back: loads the newest checkpoint into the state and returns where it was read from; collective. None where
            there is no checkpoint.
    """

    warn: Callable[[str], None]
    investigate: Callable[[TrainState, StepPlan, StepInput, dict[str, Any]], str | None]
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
        if verdict.kind == "non-finite":
            origin = self.investigate(state, plan, outcome.inputs, outcome.random)
            what += f" {origin}" if origin else " Running the step again did not show where it came from."
        if verdict.policy == "stop":
            raise _error(verdict.kind, f"{what} {_way_out(outcome)}")
        if guard.exhausted():
            raise _error(
                verdict.kind,
                f"{what} The run has used up train.max_interventions = {guard.interventions}. {_way_out(outcome)}",
            )
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
        origin = self.roll_back(state)
        if origin is None:
            raise _error(outcome.verdict.kind, f"{what} There is no checkpoint to roll back to. {_way_out(outcome)}")
        skipped = bad_end - state.cursor.consumed_samples
        state.cursor = state.cursor.skip(skipped)
        for hook in hooks:
            hook.rewind(state)
        self.warn(
            f"{what} Rolled back to {origin}; the {skipped} samples up to {bad_end} are passed over "
            f"(intervention {guard.interventions})."
        )


def _error(kind: str, message: str) -> UserError:
    return NonFiniteError(message) if kind == "non-finite" else SpikeError(message)


def _way_out(outcome: Outcome) -> str:
    result = outcome.result
    first = result.consumed_samples - result.batch_size
    return (
        "Nothing of this step was applied; the newest checkpoint is from before it. Lower optimizer.lr, set "
        "optimizer.clip_grad, let the run go on with train.non_finite_policy or train.spike_policy = skip or rollback, "
        f"or look at its samples with mslm data inspect (positions {first} to {result.consumed_samples - 1})."
    )
