"""Parent and child processes bound to each other, so that neither outlives a crash of the other (Linux prctl)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when the thread that forked it ends, even by SIGKILL; survives ``exec``."""
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(1)  # the parent was already gone when the request was made


@contextlib.contextmanager
def adopt_and_end_orphans() -> Iterator[None]:
    """On exit, kill what the ranks started and left behind (loader workers, a checkpoint's writer processes).

    While entered, processes whose parent dies below us become our children instead of init's. Children from before are
    left alone.
    """
    was_subreaper = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was_subreaper))
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    ours = psutil.Process()
    before = {child.pid for child in ours.children()}
    try:
        yield
    finally:
        # A killed orphan's own children come to us in the next round.
        while orphans := [child for child in ours.children() if child.pid not in before]:
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(orphan.pid, 0)
        _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(was_subreaper.value))
