"""The loop: take steps until the target is reached or somebody asks to stop. Everything else is a hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from megatron_slm.errors import UserError
from megatron_slm.train.guard import Guard
from megatron_slm.train.hook import Hook
from megatron_slm.train.intervention import Interventions
from megatron_slm.train.step import Outcome, StepInput, StepPlan, TrainState, train_step

EXIT_REACHED, EXIT_STOPPED = 0, 75


def run_loop(
    state: TrainState,
    plan: StepPlan,
    inputs: Iterator[StepInput],
    hooks: Sequence[Hook],
    *,
    train_iters: int,
    should_stop: Callable[[int], bool],
    guard: Guard,
    interventions: Interventions,
) -> int:
    """Train from ``state.step`` to ``train_iters``. Collective.

    Args:
        inputs: global batches from the state's cursor on, wherever that stands.
        hooks: called in this order after a step, and in the reverse order at the end.
        should_stop: this rank's wish after so many steps; one rank's wish stops all of them after the same step.
        guard: judges every step before its update.
        interventions: what is done about a step that the guard rejects.

    Raises:
        NonFiniteError, SpikeError: on every rank, at a rejected step that ends the run; nothing of it was applied.

    Returns:
        The exit code: 0 the target was reached, 75 the run stopped before it. Either way ``after_run`` has been called,
        so the state is saved.
    """
    try:
        for hook in hooks:
            hook.before_run(state)
        stopped, finished = False, any(hook.finished() for hook in hooks)
        hook_seconds = 0.0
        while state.step < train_iters and not stopped and not finished:
            for hook in hooks:
                hook.before_step(state, state.step + 1)
            outcome = train_step(
                state,
                plan,
                lambda: next(inputs),
                guard,
                hooks,
                wants_stop=should_stop(state.step + 1),
                checkpoint_seconds=hook_seconds,
            )
            started = time.perf_counter()
            _follow_up(state, plan, outcome, guard, hooks, interventions=interventions)
            hook_seconds = time.perf_counter() - started
            stopped = outcome.stop
            finished = any(hook.finished() for hook in hooks)
        code = EXIT_REACHED if finished or state.step >= train_iters else EXIT_STOPPED
        for hook in reversed(hooks):
            hook.after_run(state, code)
    except UserError as error:
        for hook in reversed(hooks):
            hook.on_error(state, error)
        raise
    return code


def _follow_up(
    state: TrainState,
    plan: StepPlan,
    outcome: Outcome,
    guard: Guard,
    hooks: Sequence[Hook],
    *,
    interventions: Interventions,
) -> None:
    """What comes after a step: trouble in the background, a rejected batch, and the hooks."""
    if outcome.trouble:
        for hook in hooks:
            hook.on_trouble(state)
    counted = interventions.take(state, plan, outcome, guard, hooks)
    state.records["guard"] = guard.record()
    if counted:
        for hook in hooks:
            hook.after_step(state, outcome.result)
