"""One function applied to many chunks in other processes, with the results in the order of the chunks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from megatron_slm.data.preparation.staging import ResumableError

T = TypeVar("T")
R = TypeVar("R")

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
    # Spawned, not forked: the threads of Arrow and of the tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (function,))
    under_way: deque[Future[R]] = deque()
    try:
        for task in itertools.chain(head, remaining):
            under_way.append(pool.submit(_work, task))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ResumableError(
            "A worker process died; most often memory ran out. Run the same command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
