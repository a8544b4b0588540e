"""A process that judges answers with verifiers, so that one that hangs or crashes takes nothing else with it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.registry import OF_THE_ROW, verifier_named, verifier_of_row
from megatron_slm.evaluate.verifiers import Fields, Unverifiable

PR_SET_PDEATHSIG = 1


class Asked(NamedTuple):
    """One answer to be judged by one verifier."""

    verifier: str
    """A name of :func:`megatron_slm.evaluate.registry.verifier_named`, or ``OF_THE_ROW``."""
    answer: str
    fields: Fields


class Score(NamedTuple):
    """What a verifier has said: a finite number, or NaN and the cause in a few words."""

    value: float
    cause: str = ""


def serve(fd: int, parent: int, names: list[str]) -> None:
    """Answer lists of :class:`Asked` with one :class:`Score` after another, until the other end is closed.

    First says None, or why a verifier cannot be loaded.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        return
    connection: Connection[Any, Any] = Connection(fd)
    try:
        loaded = {name: verifier_named(name) for name in names if name != OF_THE_ROW}
    except ConfigError as error:
        with suppress(ConnectionError):
            connection.send(str(error))
        return
    with suppress(EOFError, ConnectionError):  # who has asked has gone
        connection.send(None)
        while True:
            asked: list[Asked] = connection.recv()
            for one in asked:
                connection.send(_score(one, loaded))


def _score(asked: Asked, loaded: dict[str, Any]) -> Score:
    try:
        verifier = verifier_of_row(asked.fields) if asked.verifier == OF_THE_ROW else loaded[asked.verifier]
        found = verifier(asked.answer, asked.fields)
        value = float(found)
    except Unverifiable as error:
        return Score(math.nan, str(error))
    except Exception as error:  # a verifier is anybody's code
        return Score(math.nan, f"{type(error).__name__}: {error!s:.200}")
    return Score(value) if math.isfinite(value) else Score(math.nan, f"it gave {found!r:.60}, no finite number")
