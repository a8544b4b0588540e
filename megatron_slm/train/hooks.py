"""The hooks that keep a run honest and safe: validation and checkpoints. (The log is ``metrics_writer.py``.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import TrainState


@dataclass
class ValidationHook(Hook):
    """Held-out loss before the first step, every ``interval`` steps and when the target is reached.

    Args:
        evaluate: collective; takes the held-out loss of the state and reports it.
    """

    evaluate: Callable[[TrainState], None]
    interval: int | None
    _last: int = field(default=-1, init=False)

    def before_run(self, state: TrainState) -> None:
        if state.step == 0:
            self._evaluate(state)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.interval and state.step % self.interval == 0:
            self._evaluate(state)

    def after_run(self, state: TrainState, code: int) -> None:
        if code == 0 and self._last != state.step:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        self.evaluate(state)
        self._last = state.step


@dataclass
class CheckpointHook(Hook):
    """Saves every ``interval`` steps and when the run ends in order, target reached or not.

    Args:
        save: collective; writes, publishes and returns the checkpoint's directory.
        listeners: told of every save.
    """

    save: Callable[[TrainState], Path]
    interval: int | None
    listeners: Sequence[Hook] = ()
    _saved: int = field(default=-1, init=False)

    def before_run(self, state: TrainState) -> None:
        # A run that begins after a step came from the checkpoint of that step: it needs no second one.
        self._saved = state.step or -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.interval and state.step % self.interval == 0:
            self._save(state)

    def after_run(self, state: TrainState, code: int) -> None:
        if state.step != self._saved:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        path = self.save(state)
        self._saved = state.step
        for hook in self.listeners:
            hook.after_save(state, path)
