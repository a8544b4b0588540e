"""Ends a job in which no rank moves on, and says who waits for whom. A hook of every rank.

A thread beside the training thread looks where that stands: every call of its Python stack. When that has been the same
for too long, it writes where its rank stands (``place.py``) into the run's ``watch/``, and so does then every rank, but
for one that is stopped, dead or cut off: that it has written nothing names it. The lowest rank that has written says
the verdict (``hang.py``), and all of them end. A long validation, step or save is no hang: its ranks do come from call
to call.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import psutil
import torch.distributed as dist

from megatron_slm.errors import EXIT_HUNG
from megatron_slm.survival.hang import Standing, Verdict, judge
from megatron_slm.survival.place import place_of
from megatron_slm.train.hook import Hook, StepResult

FOLDER = "watch"
VERDICT = "hang.txt"
_TICKS = 50
"""So many looks in the time that is allowed."""
_LONGEST_TICK_S = 5.0
_PAUSED_TICKS = 10
"""A look that is so many times later than it should be: this process itself has been stopped."""
_SETTLE_SHARE, _SHORTEST_SETTLE_S = 0.1, 2.0
"""Of the time that is allowed, what the others are given to say where they stand."""


Calls = tuple[tuple[CodeType, int], ...]
"""Where a thread stands: the code and the instruction of each of its calls."""


class Progress(NamedTuple):
    """What the training thread does, and since when it has stood where it stands."""

    at_s: float
    step: int
    doing: str


def calls_of(thread: int) -> Calls:
    """Where a thread of this process stands; empty where it is gone."""
    frame, found = sys._current_frames().get(thread), []
    while frame is not None:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


class Watchdog(Hook):
    """See the module.

    Args:
        folder: the run's directory, the same for every rank.
        limit_s: longest time in one place.
        axes: name of the group of ranks that belong to an axis.
        note: keeps a line in ``progress.txt``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        limit_s: float,
        axes: Mapping[tuple[int, ...], str],
        note: Callable[[str], None],
    ) -> None:
        self._folder, self._rank, self._limit_s = folder / FOLDER, rank, limit_s
        self._axes, self._note = axes, note
        self._progress = Progress(time.monotonic(), 0, "starting")
        self._ended = threading.Event()
        self._processes: list[tuple[str, int]] = []
        self._attempt = ""

    def before_run(self, state: Any) -> None:
        """Learn where every rank runs, and begin to watch. Collective."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (socket.gethostname(), os.getpid(), time.time_ns()))
        self._processes = [(host, pid) for host, pid, _ in found]
        # Reports of an earlier start may still lie there.
        self._attempt = f"{found[0][2]:x}"
        self._mark(state.step, "before the first step")
        watched = threading.get_ident()
        threading.Thread(target=self._watch, args=(watched,), name="watchdog", daemon=True).start()

    def before_step(self, state: Any, step: int) -> None:
        self._mark(step, "reading data")

    def before_forward(self, state: Any, inputs: Any) -> None:
        self._mark(self._progress.step, "forward and backward")

    def after_backward(self, state: Any, inputs: Any) -> None:
        self._mark(self._progress.step, "judging the step")

    def before_update(self, state: Any, inputs: Any) -> None:
        self._mark(self._progress.step, "optimizer")

    def after_step(self, state: Any, result: StepResult) -> None:
        self._mark(result.step, "between steps (validation, checkpoint, log)")

    def after_save(self, state: Any, checkpoint: Path) -> None:
        self._mark(self._progress.step, "between steps (a checkpoint is saved)")

    def after_run(self, state: Any, code: int) -> None:
        """Called last but for the log: the run has ended."""
        self._ended.set()

    def on_error(self, state: Any, error: Any) -> None:
        self._ended.set()

    def _mark(self, step: int, doing: str) -> None:
        self._progress = Progress(time.monotonic(), step, doing)

    def _watch(self, watched: int) -> None:
        tick_s = min(_LONGEST_TICK_S, self._limit_s / _TICKS)
        looked_s, stood = time.monotonic(), calls_of(watched)
        while not self._ended.wait(tick_s):
            now_s, stands = time.monotonic(), calls_of(watched)
            if stands != stood or now_s - looked_s > _PAUSED_TICKS * tick_s:
                self._progress = self._progress._replace(at_s=now_s)
            looked_s, stood = now_s, stands
            # Who goes round in a circle finds out from those who wait for it.
            if now_s - self._progress.at_s > self._limit_s or self._others_have_said():
                self._end_job(watched)
                return

    def _others_have_said(self) -> bool:
        return self._folder.is_dir() and any(self._folder.glob(f"{self._attempt}-rank-*.json"))

    def _end_job(self, watched: int) -> None:
        """Say where this rank stands, let the lowest one judge, and end this process."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._report(watched)
            time.sleep(max(_SHORTEST_SETTLE_S, _SETTLE_SHARE * self._limit_s))
            standings = self._standings()
            if self._rank == min(standings):
                self._say(self._judged(standings))
            else:
                time.sleep(_SHORTEST_SETTLE_S)
        except Exception as error:  # a watchdog that cannot write must still end the job
            print(f"mslm: rank {self._rank} has not moved on for {self._limit_s:.0f} s ({error!r})", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(EXIT_HUNG)

    def _report(self, watched: int) -> None:
        frame = sys._current_frames()[watched]
        at_s, step, doing = self._progress
        own = Standing(
            rank=self._rank,
            host=self._processes[self._rank][0],
            pid=os.getpid(),
            step=step,
            doing=doing,
            seconds=time.monotonic() - at_s,
            place=place_of(frame),
            stack="".join(traceback.format_stack(frame)),
        )
        path = self._folder / f"{self._attempt}-rank-{self._rank}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(own.to_dict()), encoding="utf-8")
        os.replace(partial, path)

    def _standings(self) -> dict[int, Standing]:
        found = (json.loads(path.read_text(encoding="utf-8")) for path in self._folder.glob(f"{self._attempt}-*.json"))
        return {one.rank: one for one in map(Standing.of_dict, found)}

    def _judged(self, standings: Mapping[int, Standing]) -> Verdict:
        silent = {
            rank: self._known_of(*process) for rank, process in enumerate(self._processes) if rank not in standings
        }
        return judge(list(standings.values()), silent, self._axes)

    def _known_of(self, host: str, pid: int) -> str:
        """What can be said of another rank's process."""
        where = f"{host}, process {pid}"
        if host != socket.gethostname():
            return f"{where}: stopped, or its machine is gone"
        try:
            status = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return f"{where}: it is gone"
        stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return f"{where}: {'stopped by a signal (SIGSTOP)' if stopped else status}"

    def _say(self, verdict: Verdict) -> None:
        stacks = [
            f"\nrank {one.rank}:\n{one.stack}" for one in sorted(self._standings().values(), key=lambda one: one.rank)
        ]
        path = self._folder / VERDICT
        path.write_text(verdict.text + "\n" + "".join(stacks), encoding="utf-8")
        self._note(f"Hung\t{verdict.cause}")
        print(f"mslm: hang: {verdict.text}\nmslm: stacks of all ranks: {path}", file=sys.stderr, flush=True)
