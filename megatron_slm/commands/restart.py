"""A run that ends badly: the verb ``mslm restart`` for job scripts, and what ``mslm train --restarts`` does itself."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of
from megatron_slm.survival import restart as room
from megatron_slm.survival.restart import STARTED_VARIABLE
from megatron_slm.train.run_directory import IDENTITY

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved

EXIT_LEFT = 1
"""Of ``mslm restart``: leave the run as it is."""


def restart(name: str, tokens: Sequence[str]) -> int:
    """``mslm restart``: what a job script asks when the ranks of a run have ended badly."""
    parser = parser_of(
        name,
        "RUN --code N [--max-restarts N]",
        "Note that the ranks of a run have ended with an exit code, and say whether to start them again: exit code 0 "
        "and the seconds to wait, or exit code 1 and why not (target reached, crash loop, all restarts used).",
        example="mslm restart runs/kjv --code 1",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's directory")
    parser.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    parser.add_argument("--max-restarts", type=int, default=room.MAX_RESTARTS, metavar="N", help="of the run's life")
    own = parser.parse_args(tokens)
    decision = room.after_end(own.run, own.code, max_restarts=own.max_restarts)
    print(f"{decision.wait_s:.0f} s: {decision.reason}" if decision.again else decision.reason)
    return EXIT_OK if decision.again else EXIT_LEFT


def until_done(resolved: Resolved, restarts: int, start: Callable[[bool, Callable[[str], None]], int]) -> int:
    """Start the ranks of a run, and again after a bad end, at most ``restarts`` times over the run's life.

    Args:
        start: starts the ranks and waits for them; is told whether this is a restart, and whom to tell how they ended.

    Returns:
        The exit code of the last start.
    """
    directory = Path(resolved.config.log.runs_dir) / str(resolved.config.name)
    again = False
    while True:
        words: list[str] = []
        os.environ[STARTED_VARIABLE] = str(time.time())
        code = start(again, words.append)
        if not restarts or not (directory / IDENTITY).exists() or room.ended_well(code):
            return code
        # A watchdog's verdict, noted by a rank, says more than that a watchdog has ended the run.
        cause = room.said_cause(directory, watchdog=True) or "".join(words)
        decision = room.after_end(directory, code, max_restarts=restarts, cause=cause)
        what = f"starting again in {decision.wait_s:.0f} s" if decision.again else "not started again"
        print(f"mslm: {what}: {decision.reason}", file=sys.stderr, flush=True)
        if not decision.again:
            return code
        again = True
        time.sleep(decision.wait_s)


VERBS: Mapping[str, Verb] = {
    "restart": Verb("after a bad end of a run: start it again, or not, and why", restart),
}
