"""The hooks that keep a run honest and safe: validation and checkpoints. (The log is ``metrics_writer.py``.)"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import NonFiniteError, UserError
from megatron_slm.train.early_stopping import EarlyStopping
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import TrainState


@dataclass
class ValidationHook(Hook):
    """Held-out loss before the first step, every ``interval`` steps and when the target is reached.

    Args:
        evaluate: collective; reports and returns the held-out loss of the state, the same on every rank.
        early_stopping: is told of every loss, and may end the run.
        say: writes a line into the run's log.
    """

    evaluate: Callable[[TrainState], float]
    interval: int | None
    early_stopping: EarlyStopping | None = None
    say: Callable[[str], None] = lambda line: None
    _last: int = field(default=-1, init=False)

    def before_run(self, state: TrainState) -> None:
        if state.step == 0:
            self._evaluate(state)
        elif self.early_stopping is not None and self.early_stopping.finished:
            self.say(self.early_stopping.reason())

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.interval and state.step % self.interval == 0:
            self._evaluate(state)

    def after_run(self, state: TrainState, code: int) -> None:
        if code == 0 and self._last != state.step:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        loss = self.evaluate(state)
        self._last = state.step
        if self.early_stopping is not None:
            already = self.early_stopping.finished
            self.early_stopping.observe(loss, state.step)
            state.records["early_stopping"] = self.early_stopping.record()
            if self.early_stopping.finished and not already:
                self.say(self.early_stopping.reason())

    def finished(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.finished

    def rewind(self, state: TrainState) -> None:
        self._last = -1
        if self.early_stopping is not None:
            self.early_stopping.restore(state.records.get("early_stopping"))


@dataclass
class CheckpointHook(Hook):
    """Saves every ``interval`` steps and when the run ends in order, target reached or not.

    In the background a save costs the training thread the time of ``stage``; one is in flight at most, so that a second
    waits. A failure there ends the run at the next step, on every rank.

    Args:
        stage: collective; takes what is to be saved out of the state, and returns the function that writes and
            publishes it, collective too, on any thread. It raises the same on every rank.
        is_finite: collective; a state that is not is never saved: it could only displace one that is.
        background: write while training goes on.
        listeners: told of every save once it is published.
        say: writes a line into the run's log.
    """

    stage: Callable[[TrainState], Callable[[], Path]]
    is_finite: Callable[[TrainState], bool]
    interval: int | None
    background: bool = False
    listeners: Sequence[Hook] = ()
    say: Callable[[str], None] = lambda line: None
    _saved: int = field(default=-1, init=False)
    _refused: int = field(default=-1, init=False)
    _writer: ThreadPoolExecutor = field(init=False)
    _in_flight: InFlight | None = field(default=None, init=False)

    def before_run(self, state: TrainState) -> None:
        # A run that begins after a step came from the checkpoint of that step: it needs no second one.
        self._saved = state.step or -1
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Core collects garbage in every save, and would each time go through all that was imported and built so far.
        gc.collect()
        gc.freeze()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not self.is_writing() and not self.in_trouble():
            self._land(state)
        if self.interval and state.step % self.interval == 0:
            self._save(state, background=self.background)

    def after_run(self, state: TrainState, code: int) -> None:
        if state.step != self._saved:
            self._save(state, background=False)
        self._land(state)
        self._writer.shutdown()
        if self._refused == state.step:
            raise NonFiniteError(
                f"after step {state.step} weights or optimizer hold values that are not finite: this state is not "
                "saved. Start the run again: it goes on from the newest checkpoint, whose values are finite."
            )

    def is_writing(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._in_flight is not None and not self._in_flight.written.done()

    def in_trouble(self) -> bool:
        flight = self._in_flight
        return flight is not None and flight.written.done() and flight.written.exception() is not None

    def on_trouble(self, state: TrainState) -> None:
        self._land(state)

    def settle(self) -> None:
        if self._in_flight is not None:
            wait([self._in_flight.written])

    def on_error(self, state: TrainState, error: UserError) -> None:
        with contextlib.suppress(UserError):
            self._land(state)

    def rewind(self, state: TrainState) -> None:
        # What follows is not what followed when this step was saved: the data position is another.
        self._saved = -1

    def _save(self, state: TrainState, *, background: bool) -> None:
        started = time.perf_counter()
        self._land(state)
        waited = time.perf_counter() - started
        self._saved = state.step
        if not self.is_finite(state):
            self._refused = state.step
            self.say(
                f"warning: after step {state.step} weights or optimizer hold values that are not finite: no checkpoint "
                "is made of them"
            )
            return
        write = self.stage(state)
        staged = time.perf_counter()
        if background:
            self._in_flight = InFlight(self._writer.submit(write), state.step, staged, staged - started, waited)
        else:
            self._tell(state, write())

    def _land(self, state: TrainState) -> None:
        """Wait for the save in flight, if any.

        Raises:
            SaveError: it could not be written.
        """
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            path = flight.written.result()
            self._tell(state, path)
            waited = f", {1e3 * flight.waited:.0f} ms of them for the save before" if flight.waited > 1e-3 else ""
            self.say(
                f"{path.name} was saved in the background: training paused for {1e3 * flight.paused:.0f} ms{waited}; "
                f"published by step {state.step}, {time.perf_counter() - flight.staged:.1f} s later"
            )

    def _tell(self, state: TrainState, path: Path) -> None:
        for hook in self.listeners:
            hook.after_save(state, path)


class InFlight(NamedTuple):
    """A save in the background: when it was staged, and the seconds that training paused and of these waited for it."""

    written: Future[Path]
    step: int
    staged: float
    paused: float
    waited: float
