"""The work of one rank, seen from inside it: run it, and tell whoever started it how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from megatron_slm.launch import mpi, report
from megatron_slm.launch.environment import RankEnvironment

REPORT_VARIABLE = "MSLM_REPORT_FD"
# MPICH's launcher ends at an Abort without reading what is still in the ranks' pipes: our last words among it.
_SECONDS_FOR_LAUNCHER = 0.3


def run_rank(environment: RankEnvironment, entry: Callable[[RankEnvironment], int]) -> int:
    """Run ``entry`` as the rank that ``from_environment`` found, under any launcher.

    The launcher's variables are exported for torch first. A failure is said once, with rank and traceback: to the
    parent if it is ours (then this does not return), on standard error under torchrun and Slurm, and there with an MPI
    Abort under MPI. Under torchrun and MPI ``entry`` must destroy its process group: the interpreter's exit follows.

    Returns:
        ``entry``'s exit code, 2 where it raised a UserError, 1 where it raised anything else.
    """
    report_fd = os.environ.pop(REPORT_VARIABLE, None)
    os.environ.update(environment.to_environ())
    if environment.launcher == "local" and report_fd is not None:
        os.set_inheritable(int(report_fd), False)
        run_and_report(environment, entry, int(report_fd))
    if environment.launcher == "mpi":
        with abort_on_exception(environment):
            return entry(environment)
    try:
        return entry(environment)
    except Exception as error:  # whatever ends a rank is reported
        return report.print_failure(environment, error)


def run_and_report(environment: RankEnvironment, entry: Callable[[RankEnvironment], int], report_fd: int) -> NoReturn:
    """Run ``entry``, write its end into the parent's pipe and end the process at once.

    Without the interpreter's own exit: it would run what the parent registered for itself, and can wait forever for a
    communicator whose peer is dead. A crash below Python leaves its Python stack in the pipe instead of a report.
    """
    faulthandler.enable(file=report_fd)
    try:
        ended = report.of_return(entry(environment))
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        ended = report.of_return(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except BaseException as error:  # whatever ends a rank is reported
        ended = report.of_exception(error)
    message = ended.to_bytes()
    while message:
        message = message[os.write(report_fd, message) :]
    with contextlib.suppress(OSError, ValueError):  # nobody reads our output any more, or it was closed
        sys.stdout.flush()
        sys.stderr.flush()
    logging.shutdown()
    os._exit(ended.code & 0xFF)


@contextlib.contextmanager
def abort_on_exception(environment: RankEnvironment) -> Iterator[None]:
    """End the whole MPI job when this rank fails: ``mpirun`` alone would leave the others waiting for it.

    A refused input (UserError) prints its message and ends the job with 2, anything else "rank N of M died" with its
    traceback and 1. Does not return after an exception.
    """
    try:
        yield
    except Exception as error:  # whatever ends a rank is reported
        code = report.print_failure(environment, error)
        time.sleep(_SECONDS_FOR_LAUNCHER)
        mpi.load_mpi().COMM_WORLD.Abort(code)
        os._exit(code)  # MPI allows an Abort that returns
