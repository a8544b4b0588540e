"""Whether a run that has ended badly is started again: bounded, with a growing pause, and never in a circle. No torch.

Every end before the target is a line of the run's ``restarts.jsonl``. What counts as getting on is a checkpoint: ends
between which none was added are one trouble, and are the sooner given up the more alike they are.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_slm.errors import CheckpointError, LogError, UserError
from megatron_slm.survival.kept import read_lines
from megatron_slm.train.publish import published

FILE = "restarts.jsonl"
STARTED_VARIABLE = "MSLM_STARTED"
"""Seconds since 1970 at which the process began that has started the ranks, where no rank is that process."""
EXIT_STOPPED = 75
MAX_RESTARTS = 10
ALIKE, UNLIKE = 3, 5
"""So many ends without a new checkpoint, of one cause or of several, and the run is given up."""
_PAUSE_S, _GROWTH, _LONGEST_PAUSE_S = 1.0, 4.0, 300.0
_NO_CAUSE = "the ranks ended with exit code {code} and left no word"
_HUNG, _FAILED, _LOST = "Hung", "Failed", "Lost"
_STARTED = "Starting job"
_LONGEST_CAUSE = 400
_DAY_S = 86400.0
_STOPPED = "stopped before anything new was saved"
_OF_A_RUN = ("identity.json", FILE, "slurm")
"""One of these lies in a run's directory; the last two may be there before the run has begun."""


@dataclass(frozen=True)
class End:
    """One bad end: ``at`` in seconds since 1970, the newest checkpoint's step, the cause as far as it was said."""

    at: float
    code: int
    checkpoint: int | None
    cause: str


@dataclass(frozen=True)
class Decision:
    """Start again after ``wait_s`` seconds, or not, and why."""

    again: bool
    wait_s: float
    reason: str


def ended_well(code: int) -> bool:
    """Whether an exit code leaves nothing to start again: reached, refused, or stopped because somebody asked."""
    return code in (0, UserError.exit_code, EXIT_STOPPED)


def after_end(directory: Path, code: int, *, max_restarts: int = MAX_RESTARTS, cause: str = "") -> Decision:
    """Note that the run in ``directory`` has ended with ``code``, and decide.

    Args:
        cause: of whoever started the ranks; where it is empty the run's ``progress.txt`` is asked.

    Raises:
        CheckpointError: there is no such directory.
        LogError: nothing can be written there.
    """
    if code == 0:
        return Decision(False, 0.0, "the run has reached its target")
    if code == UserError.exit_code:
        return Decision(False, 0.0, "the input was refused; starting again would be refused too")
    if not any((directory / name).exists() for name in _OF_A_RUN):
        raise CheckpointError(f"{directory} is not a run's directory; give the one below log.runs_dir")
    said = _STOPPED if code == EXIT_STOPPED else cause or said_cause(directory) or _NO_CAUSE.format(code=code)
    newest = max(published(directory / "checkpoints"), default=None)
    end = End(time.time(), code, newest, said.splitlines()[0][:_LONGEST_CAUSE])
    try:
        with (directory / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(end)) + "\n")
    except OSError as error:
        raise LogError(
            f"{directory} cannot be written ({error.strerror or error}), so the run would fail again; make room there, "
            f"and start it by hand. It has ended with: {end.cause}"
        ) from error
    return decide(read_ends(directory), max_restarts)


def decide(ends: Sequence[End], max_restarts: int) -> Decision:
    """What follows from all ends of a run, the newest last. A clean stop counts where it has saved nothing new."""
    newest = ends[-1]
    stuck = _without_progress(ends)
    where = "no checkpoint" if newest.checkpoint is None else f"the checkpoint of step {newest.checkpoint}"
    if newest.code == EXIT_STOPPED and len(stuck) == 1 and newest.checkpoint is not None:
        return Decision(True, 0.0, "stopped after a clean save")
    alike = [end for end in stuck if _kind_of(end.cause) == _kind_of(newest.cause)]
    if len(alike) >= ALIKE:
        return Decision(
            False, 0.0, f"crash loop: {len(alike)} starts from {where} ended in the same way, the last: {newest.cause}"
        )
    if len(stuck) >= UNLIKE:
        causes = "; ".join(dict.fromkeys(end.cause for end in stuck))
        return Decision(False, 0.0, f"crash loop: {len(stuck)} starts from {where} ended without a new one: {causes}")
    wait_s = min(_LONGEST_PAUSE_S, _PAUSE_S * _GROWTH ** (len(stuck) - 1))
    if newest.code == EXIT_STOPPED:
        return Decision(True, wait_s, f"{newest.cause}; from {where}")
    recent = [end for end in ends if end.code != EXIT_STOPPED and newest.at - end.at < _DAY_S]
    if len(recent) > max_restarts:
        return Decision(
            False,
            0.0,
            f"all {max_restarts} restarts of a day are used, the last end: {newest.cause}; start it by hand to go on",
        )
    return Decision(True, wait_s, f"restart {len(recent)} of {max_restarts} from {where}, after: {newest.cause}")


def read_ends(directory: Path) -> list[End]:
    """Every bad end of the run, oldest first; a torn line is left out."""
    return read_lines(directory / FILE, End)


def said_cause(directory: Path, *, watchdog: bool = False) -> str:
    """What a rank has noted in ``progress.txt`` since the last start; empty where none has.

    Args:
        watchdog: ask for a watchdog's verdict alone.
    """
    try:
        lines = (directory / "progress.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said: dict[str, str] = {}
    for line in reversed(lines):
        event, _, text = line.rpartition("\t# GPUs: ")[2].partition("\t")[2].partition("\t")
        if event == _STARTED:
            break
        said[event] = text
    # Who lost a peer is seldom to blame for it.
    asked = (_HUNG,) if watchdog else (_HUNG, _FAILED, _LOST)
    return next((said[event] for event in asked if event in said), "")


def _kind_of(cause: str) -> str:
    """The cause without its numbers (steps, seconds, processes), but for those of ranks."""
    return re.sub(r"(?<!rank )\b\d+(\.\d+)?", "#", cause)


def _without_progress(ends: Sequence[End]) -> list[End]:
    """The last ends, as many as lie at one checkpoint."""
    found: list[End] = []
    for end in reversed(ends):
        if end.checkpoint != ends[-1].checkpoint:
            break
        found.append(end)
    return found
