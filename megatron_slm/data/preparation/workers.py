"""One function applied to many chunks in other processes, with the results in the order of the chunks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_slm.data.preparation.staging import ResumableError

T = TypeVar("T")
R = TypeVar("R")

SECONDS_BETWEEN_LOOKS = 1.0

_WORK: dict[str, Callable[[Any], Any]] = {}
"""In a worker: the function of its pool, so that what it loads on its first call is there on the second."""


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """``function`` of each task, in order.

    With one worker, and for a single task, everything happens here: a process takes longer to start than small work
    takes. At most two tasks a worker are under way, so memory does not grow with the number of tasks.

    Args:
        function: picklable; it is sent to every worker once.

    Raises:
        ResumableError: a worker died.
    """
    remaining = iter(tasks)
    head = list(itertools.islice(remaining, 2))
    if workers == 1 or len(head) < 2:
        yield from map(function, itertools.chain(head, remaining))
        return
    crew = _Crew(workers, function)
    under_way: deque[Future[R]] = deque()
    try:
        for task in itertools.chain(head, remaining):
            under_way.append(crew.submit(task))
            if len(under_way) > 2 * workers:
                yield crew.result(under_way.popleft())
        while under_way:
            yield crew.result(under_way.popleft())
    except BrokenProcessPool as error:
        crew.kill()
        raise ResumableError(
            "A worker process died; most often memory ran out. Run the same command again, with fewer --workers."
        ) from error
    finally:
        crew.pool.shutdown(cancel_futures=True)


class _Crew:
    """A process pool that notices every dead worker.

    Python 3.11's own pool can wait for ever when a worker dies while a task is being handed in or an answer given: for
    a future that nobody will fill, for a worker that it started after it had ended the others (cpython issue 94777 and
    those linked there), or for the rest of an answer. So the workers are looked at from here too.
    """

    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self._others = set(multiprocessing.active_children())
        # Spawned, not forked: the threads of Arrow and of the tokenizers do not survive a fork.
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (function,))
        self._workers: set[BaseProcess] = set()

    def submit(self, task: Any) -> Future[Any]:
        future = self.pool.submit(_work, task)
        self._workers |= set(multiprocessing.active_children()) - self._others
        return future

    def result(self, future: Future[R]) -> R:
        """Raises BrokenProcessPool where a worker died, as the pool itself does when it notices."""
        while not futures.wait([future], timeout=SECONDS_BETWEEN_LOOKS).done:
            if not all(worker.is_alive() for worker in self._workers):
                raise BrokenProcessPool("a worker ended without an answer")
        return future.result()

    def kill(self) -> None:
        """After this the pool can be shut down, whatever its own thread waits for."""
        for worker in set(multiprocessing.active_children()) - self._others:
            worker.kill()
        # A worker that died while it answered leaves half an answer, whose end the pool's thread would await for ever:
        # this process holds the pipe's writing end too.
        answers: Any = self.pool._result_queue
        answers._writer.close()


def _begin(function: Callable[[Any], Any]) -> None:
    """The first thing a worker does."""
    # Ctrl-C reaches the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORK["function"] = function


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(task: Any) -> Any:
    return _WORK["function"](task)
