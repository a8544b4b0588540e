"""Runs ``mslm verify`` from a test, in a process of its own that imports torch and core once.

``verify`` forks its ranks from the process that calls it, which must have run no tensor op; pytest's has.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.verify.report import Report

Plant = Callable[[], None]


class Ended(NamedTuple):
    """How ``mslm verify`` ended."""

    code: int
    out: str
    err: str


@functools.cache
def worker() -> ProcessPoolExecutor:
    """The one process of this session that forks the ranks."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def verified(runs: Sequence[RunConfig], plant: Plant | None = None) -> Report:
    """The report on runs that are small already; ``plant`` is a function at the top of an importable module."""
    return worker().submit(_verify, runs, plant).result()


def command(*tokens: str, plant: Plant | None = None) -> Ended:
    """``mslm verify TOKENS``, with a fault in its parallel ranks."""
    return worker().submit(_command, tokens, plant).result()


def _verify(runs: Sequence[RunConfig], plant: Plant | None) -> Report:
    from megatron_slm.verify.verify import verify_runs

    return verify_runs(runs, plant=plant)


def _command(tokens: Sequence[str], plant: Plant | None) -> Ended:
    from megatron_slm import cli
    from megatron_slm.verify import verify as room

    original = room.verify
    room.verify = functools.partial(original, plant=plant)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["verify", *tokens])
    finally:
        room.verify = original
    return Ended(code, out.getvalue(), err.getvalue())
