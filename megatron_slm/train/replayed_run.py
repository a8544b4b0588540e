"""Whether a run still replays what it replayed when it was saved. No torch."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.config.mixture_text import REPLAY
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.replay import ReplayedSamples
from megatron_slm.errors import CheckpointError
from megatron_slm.train.publish import published
from megatron_slm.train.saved_state import read_state


def refuse_other_replay(replay_run: str | None, saved: Cursor, start: Cursor) -> None:
    """What comes again is what came before, also where the replayed run has trained on since.

    Args:
        saved: the cursor of the checkpoint.
        start: a cursor of the present data.

    Raises:
        CheckpointError: it is not; names the checkpoint of ``replay_run`` that gives it.
    """
    wanted, found = (_replay_digest(cursor) for cursor in (saved, start))
    if replay_run is None or wanted is None or found is None or wanted == found:
        return
    path = _checkpoint(Path(replay_run), wanted)
    remedy = (
        f"set data.replay_run={path}, the checkpoint that it was"
        if path is not None
        else "no checkpoint of it is left that does: restore it, or start a new run with "
        "checkpoint.pretrained_checkpoint"
    )
    raise CheckpointError(
        f"data.replay_run={replay_run} does not give the samples any more that this run was reading; {remedy}."
    )


def _checkpoint(run: Path, wanted: str) -> Path | None:
    """The checkpoint beside or in ``run`` up to which the samples of this digest were trained on."""
    for path in (path for place in (run / "checkpoints", run, run.parent) for path in published(place).values()):
        try:
            if ReplayedSamples({}, Cursor.from_dict(read_state(path).cursor)).digest == wanted:
                return path
        except CheckpointError:
            continue  # a damaged one is not the way out
    return None


def _replay_digest(cursor: Cursor) -> str | None:
    return next((source.order.digest for source in cursor.order.sources if source.name == REPLAY), None)
