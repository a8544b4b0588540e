"""Goodput: the time of the steps that a run has kept, over all the time that it had its ranks. A hook of one rank.

``attempts.jsonl`` of a run holds one object for every start: when its process began, the step it began at, the step and
the time it was last seen. Steps that a crash has lost, start-up, checkpoints and validation are what is missing from 1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_slm.survival.kept import read_lines
from megatron_slm.survival.restart import STARTED_VARIABLE
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.metrics import read_records
from megatron_slm.train.metrics_writer import stop_when_full
from megatron_slm.train.run_directory import RunDirectory

FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a run: from ``started`` to ``last_seen``, seconds since 1970, ``first_step`` to ``last_step``."""

    started: float
    first_step: int
    last_step: int
    last_seen: float


def read_attempts(directory: Path) -> list[Attempt]:
    """Every start of the run in ``directory``, oldest first; a torn line is left out."""
    return read_lines(directory / FILE, Attempt)


def began(environ: Mapping[str, str]) -> float:
    """When this job's first process began."""
    return float(environ.get(STARTED_VARIABLE) or psutil.Process(os.getpid()).create_time())


class Goodput(Hook):
    """See the module.

    Args:
        interval: steps between lines of the log, which the number is part of.
        write: adds values to the next step's record.
        say: writes a line of the log.
    """

    def __init__(
        self,
        directory: RunDirectory,
        interval: int,
        *,
        write: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self._directory, self._interval, self._write, self._say = directory, interval, write, say
        self._kept_s: dict[int, float] = {}

    def before_run(self, state: Any) -> None:
        """Note the start."""
        self._before = read_attempts(self._directory.path)
        self._own = Attempt(began(os.environ), state.step, state.step, time.time())
        self._keep_until(state.step)
        self._note(state.step)
        if self._before:
            lost = max(0, self._before[-1].last_step - state.step)
            self._say(
                f"start {len(self._before) + 1} of this run, at step {state.step}; {lost} steps are made again; "
                f"goodput until now {self.value():.1%}"
            )

    def after_step(self, state: Any, result: StepResult) -> None:
        self._kept_s[result.step] = result.times.total
        if (result.step + 1) % self._interval == 0:
            self._note(result.step)
            self._write({"goodput": self.value()})

    def rewind(self, state: Any) -> None:
        self._kept_s = {step: seconds for step, seconds in self._kept_s.items() if step <= state.step}

    def after_run(self, state: Any, code: int) -> None:
        """Say what the run was worth."""
        self._note(state.step)
        wall_s, starts = self._wall_s(), len(self._before) + 1
        self._say(
            f"goodput {self.value():.1%}: {sum(self._kept_s.values()):.1f} s of steps that are kept, in {wall_s:.1f} s "
            f"of {starts} start{'s' * (starts > 1)}"
        )

    def value(self) -> float:
        """Seconds of kept steps over seconds of all starts, 0 to 1."""
        return min(1.0, sum(self._kept_s.values()) / max(1e-9, self._wall_s()))

    def _wall_s(self) -> float:
        return sum(one.last_seen - one.started for one in [*self._before, self._own])

    def _keep_until(self, step: int) -> None:
        records = read_records(self._directory.metrics) if self._directory.metrics.exists() else []
        self._kept_s = {record["step"]: 1e-3 * record["step_ms"] for record in records if record["step"] <= step}

    def _note(self, step: int) -> None:
        self._own = Attempt(self._own.started, self._own.first_step, step, time.time())
        text = "".join(json.dumps(asdict(one)) + "\n" for one in [*self._before, self._own])
        path = self._directory.path / FILE
        partial = path.with_name(f".{FILE}.partial")
        with stop_when_full(self._directory.path):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
