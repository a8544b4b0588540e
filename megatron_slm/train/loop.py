"""The loop: take steps until the target is reached or somebody asks to stop. Everything else is a hook."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from megatron_slm.errors import NonFiniteError
from megatron_slm.parallel.groups import any_rank
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import StepInput, StepPlan, TrainState, train_step

EXIT_REACHED, EXIT_STOPPED = 0, 75


def run_loop(
    state: TrainState,
    plan: StepPlan,
    inputs: Iterator[StepInput],
    hooks: Sequence[Hook],
    *,
    train_iters: int,
    should_stop: Callable[[int], bool],
) -> int:
    """Train from ``state.step`` to ``train_iters``. Collective.

    Args:
        inputs: global batches from the state's cursor on.
        hooks: called in this order after a step, and in the reverse order at the end.
        should_stop: this rank's wish after so many steps; one rank's wish stops all of them after the same step.

    Raises:
        NonFiniteError: on every rank, after a step whose gradients are not finite and before any hook sees the state.

    Returns:
        The exit code: 0 the target was reached, 75 the run stopped before it. Either way ``after_run`` has been called,
        so the state is saved.
    """
    for hook in hooks:
        hook.before_run(state)
    stopped, save_seconds = False, 0.0
    while state.step < train_iters and not stopped:
        for hook in hooks:
            hook.before_step(state, state.step + 1)
        result = train_step(state, plan, lambda: next(inputs), save_seconds)
        refuse_non_finite(result)
        started = time.perf_counter()
        for hook in hooks:
            hook.after_step(state, result)
        save_seconds = time.perf_counter() - started
        stopped = any_rank(should_stop(state.step), plan.device)
    code = EXIT_REACHED if state.step >= train_iters else EXIT_STOPPED
    for hook in reversed(hooks):
        hook.after_run(state, code)
    return code


def refuse_non_finite(result: StepResult) -> None:
    """End the run at the first step whose gradient norm, which is global, is NaN or infinite.

    Raises:
        NonFiniteError: names the step, and what to do about it.
    """
    if not math.isfinite(result.grad_norm):
        raise NonFiniteError(
            f"step {result.step}: the gradient norm is {result.grad_norm} (learning rate "
            f"{result.learning_rate:g}). Nothing of this step is saved; the newest checkpoint is from before it. Lower "
            "optimizer.lr, set optimizer.clip_grad, or look at its samples with mslm data inspect (positions "
            f"{result.consumed_samples - result.batch_size} to {result.consumed_samples - 1})."
        )
