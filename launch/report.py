"""How a rank says that it ended: one record for the parent that started it, or text on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Literal

from megatron_slm.errors import UserError
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.network import lost_peer

MAX_TRACEBACK_LINES = 60
# Another rank's input error is usually the same one; rank 0 gets this long to say it for all and to end the others.
_SECONDS_FOR_RANK_0 = 2.0


@dataclass(frozen=True)
class Report:
    """The end of one rank.

    ``at_s`` is on the machine's monotonic clock, which all its processes share. ``code`` is the exit code; ``message``
    one paragraph; ``traceback`` the formatted traceback of an exception, empty otherwise.
    """

    kind: Literal["returned", "refused", "raised"]
    at_s: float
    code: int
    message: str = ""
    traceback: str = ""

    def to_bytes(self) -> bytes:
        """One line of JSON, small enough for a pipe that nobody reads yet."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()


def from_bytes(received: bytes) -> Report | None:
    """The report in what a rank wrote into its pipe; None where it ended without one."""
    for line in received.splitlines():
        if line.startswith(b'{"kind"'):
            try:
                return Report(**json.loads(line))
            except ValueError:
                return None  # killed in the middle of writing
    return None


def of_return(code: int) -> Report:
    """The rank's work came back with ``code``."""
    return Report("returned", time.monotonic(), code)


def of_exception(error: BaseException) -> Report:
    """The rank's work raised ``error``."""
    if isinstance(error, UserError):
        return Report("refused", time.monotonic(), error.exit_code, str(error))
    if lost := lost_peer(error):
        return Report("refused", time.monotonic(), 1, lost)
    summary = "".join(traceback.format_exception_only(error)).strip().splitlines() or [type(error).__name__]
    return Report("raised", time.monotonic(), 1, summary[0][:1000], _last_lines(error))


def _last_lines(error: BaseException) -> str:
    # 200 characters a line: the whole must fit into a pipe's buffer.
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) > MAX_TRACEBACK_LINES:
        lines = [f"... {len(lines) - MAX_TRACEBACK_LINES} lines above", *lines[-MAX_TRACEBACK_LINES:]]
    return "\n".join(line[:200] for line in lines)


def print_failure(environment: RankEnvironment, error: Exception) -> int:
    """Say on standard error why this rank ends, where no parent of ours collects it; returns the exit code."""
    ended = of_exception(error)
    if ended.kind == "refused":
        if environment.rank != 0:
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"mslm: {ended.message}", file=sys.stderr, flush=True)
        return ended.code
    where = f"rank {environment.rank} of {environment.world_size}"
    print(f"mslm: {where} died: {ended.message}\n{ended.traceback}", file=sys.stderr, flush=True)
    return ended.code
