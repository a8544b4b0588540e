"""Answers judged by several processes, each of which is ended where a verifier takes too long. No torch."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.verifier_process import Asked, Score

_SERVE = (
    "import sys; sys.path[:] = {path!r}; from megatron_slm.evaluate.verifier_process import serve; "
    "serve({fd}, {parent}, {names!r})"
)
START_S = 120.0
"""For loading the verifiers, which may import anything, on a busy machine."""
MAX_CHUNK = 32
HOPELESS = 8
"""A verifier that has taken too long so many times in a row is not asked again about these answers: the others of the
run wait for them, and give up after parallel.distributed_timeout_minutes."""


class _Worker:
    """One process, and which answers it has been asked about but has not judged."""

    def __init__(self, names: Sequence[str]) -> None:
        self.connection: Connection[Any, Any]
        self.connection, theirs = Pipe()
        program = _SERVE.format(path=sys.path, fd=theirs.fileno(), parent=os.getpid(), names=list(names))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a verifier prints is no output of the command
            start_new_session=True,  # Ctrl-C is for us; and what it starts is ended with it
        )
        theirs.close()
        self.ready = False
        self.until = time.monotonic() + START_S
        self.places: deque[int] = deque()

    def end(self) -> None:
        """Kill it and its process group; a sandbox below it ends by itself."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Round:
    """One list of answers on its way.

    Attributes:
        left: places that no process has been asked about.
        hung: of each verifier, how many times in a row it took too long.
    """

    def __init__(self, asked: Sequence[Asked], size: int) -> None:
        self.asked, self._size = asked, size
        self.found = [Score(math.nan, "was not judged")] * len(asked)
        self.left = deque(range(len(asked)))
        self.hung: Counter[str] = Counter()

    def chunk(self) -> deque[int]:
        """The next places, without those of a verifier that is past hope."""
        places: deque[int] = deque()
        while self.left and len(places) < self._size:
            place = self.left.popleft()
            if self.hung[self.asked[place].verifier] < HOPELESS:
                places.append(place)
            else:
                self.found[place] = Score(math.nan, f"it had taken too long {HOPELESS} times in a row")
        return places

    def judged(self, place: int, score: Score, *, hung: bool) -> None:
        """Keep the score of one answer."""
        self.found[place] = score
        name = self.asked[place].verifier
        self.hung[name] = self.hung[name] + 1 if hung else 0


class VerifierPool:
    """Judges answers; each has as much time as the others, whatever became of them.

    Args:
        names: of the verifiers, see :func:`megatron_slm.evaluate.registry.verifier_named`.
        workers: processes.
        timeout_s: for one answer by one verifier.

    Raises:
        ConfigError: a verifier cannot be loaded.
    """

    def __init__(self, names: Sequence[str], *, workers: int, timeout_s: float) -> None:
        self._names, self._timeout_s = list(dict.fromkeys(names)), timeout_s
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._names))
            for worker in self._workers:
                self._require_start(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; they end with this one too."""
        while self._workers:
            self._workers.pop().end()

    def scores(self, asked: Sequence[Asked]) -> list[Score]:
        """The score of each, in their order. Whatever a verifier does, this returns."""
        whole = _Round(asked, max(1, min(MAX_CHUNK, len(asked) // (4 * len(self._workers)))))
        while True:
            for worker in self._workers:
                if worker.ready and not worker.places and (places := whole.chunk()):
                    self._ask(worker, places, whole)
            busy = [worker for worker in self._workers if worker.places]
            starting = [worker for worker in self._workers if not worker.ready] if whole.left else []
            if not busy and not starting:
                return whole.found
            pending = busy + starting
            patience = min(worker.until for worker in pending) - time.monotonic()
            heard = wait([worker.connection for worker in pending], max(0.0, patience))
            for worker in pending:
                if worker.connection in heard:
                    self._hear(worker, whole)
                elif time.monotonic() > worker.until:
                    self._failed(worker, whole, f"it took longer than {self._timeout_s:g} s", hung=True)

    def _require_start(self, worker: _Worker) -> None:
        try:
            problem = worker.connection.recv() if worker.connection.poll(START_S) else f"it takes over {START_S:g} s"
        except EOFError:
            problem = f"its process ended with code {worker.process.wait()}"
        if problem is not None:
            raise ConfigError(f"The verifiers {', '.join(self._names)} cannot be loaded: {problem}")
        worker.ready = True

    def _ask(self, worker: _Worker, places: deque[int], whole: _Round) -> None:
        worker.places, worker.until = places, time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):  # it has died, which is heard next
            worker.connection.send([whole.asked[place] for place in places])

    def _hear(self, worker: _Worker, whole: _Round) -> None:
        """Take one message."""
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            self._failed(worker, whole, "it ended the process that it ran in", hung=False)
            return
        if not worker.ready:
            if said is not None:
                self._failed(worker, whole, str(said), hung=False)
            worker.ready = True
            return
        whole.judged(worker.places.popleft(), said, hung=False)
        worker.until = time.monotonic() + self._timeout_s

    def _failed(self, worker: _Worker, whole: _Round, cause: str, *, hung: bool) -> None:
        """One answer has no score; another process takes the rest. An answer is spent each time, so this ends."""
        places = worker.places or deque(itertools.islice(whole.left, 1))
        if not worker.places and places:
            whole.left.popleft()
        if places:
            whole.judged(places.popleft(), Score(math.nan, cause), hung=hung)
        whole.left.extendleft(reversed(places))
        worker.end()
        self._workers[self._workers.index(worker)] = _Worker(self._names)
