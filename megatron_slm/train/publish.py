"""Checkpoint directories that exist either whole or not at all. No torch.

    checkpoints/
      latest_checkpointed_iteration.txt    the step of the newest checkpoint
      iter_0000100/                        published; ``manifest.json`` holds the size and hash of every other file
      .tmp-iter_0000200-1f0c93ab/          being written, or left by a save that was killed
      .old-iter_0000100-77d2e0b4/          the previous iter_0000100 while the same step is published again
      .gone-iter_0000050-5ac1be09/         being removed

The order is payload, rename, tracker, and each is on the disk before the next begins, so a process killed at any
moment (or a machine that loses power) leaves the tracker on a complete checkpoint. One process publishes at a time.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from megatron_slm.errors import CheckpointError
from megatron_slm.train.manifest import PUBLISHED, seal, sync, write_synced

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_path(checkpoints_dir: Path, step: int) -> Path:
    """The directory a checkpoint of ``step`` completed steps is published under, Megatron's name."""
    assert step >= 0, f"a checkpoint is of 0 or more completed steps, not {step}"
    return checkpoints_dir / f"iter_{step:07d}"


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Create the temporary directory that a checkpoint is written into; what an interrupted save left is removed."""
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    sync(checkpoints_dir.parent)
    _tidy(checkpoints_dir)
    temporary = checkpoints_dir / f".tmp-{checkpoint_path(checkpoints_dir, step).name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def publish(temporary: Path, final: Path, *, identity: str = "") -> None:
    """Make the written ``temporary`` the newest checkpoint.

    If ``final`` exists (a resumed run makes the same step again), it is kept aside until the new one is in its place;
    :func:`latest` finds it there.

    Args:
        temporary: from :func:`begin`, with every file of the payload complete.
        final: :func:`checkpoint_path` of the same step.
        identity: digest of the identity of the run that it is of.
    """
    checkpoints_dir = final.parent
    assert temporary.parent == checkpoints_dir, f"{temporary} and {final} must be siblings: a rename does not copy"
    step = int(final.name.removeprefix("iter_"))
    seal(temporary, step=step, identity=identity)
    aside = checkpoints_dir / f".old-{final.name}-{secrets.token_hex(4)}"
    if final.exists():
        final.rename(aside)
        # A power failure must not keep the second rename without the first.
        sync(checkpoints_dir)
    temporary.rename(final)
    sync(checkpoints_dir)
    _write_tracker(checkpoints_dir, step)
    if aside.exists():
        shutil.rmtree(aside)


def remove(path: Path) -> None:
    """Delete a published checkpoint: under another name first, so that a kill leaves none that is half there."""
    gone = path.with_name(f".gone-{path.name}-{secrets.token_hex(4)}")
    path.rename(gone)
    sync(path.parent)
    shutil.rmtree(gone)


def tracked_step(checkpoints_dir: Path) -> int | None:
    """The step that the tracker names, or ``None`` without a tracker.

    Raises:
        CheckpointError: it holds something else.
    """
    tracker = checkpoints_dir / TRACKER
    try:
        text = tracker.read_bytes().decode("ascii", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"{tracker} holds {text[:40]!r}, not the number of a step; write the step of one of "
            f"{_names(checkpoints_dir)} into it"
        )
    return int(text)


def latest(checkpoints_dir: Path) -> Path | None:
    """The checkpoint that the tracker names, or ``None`` where nothing has been published.

    Changes nothing, so other programs may call it during a save. The returned directory has another name than
    ``iter_NNNNNNN`` when a save of the same step was killed between its two renames.

    Raises:
        CheckpointError: the tracker is damaged, or what it names is gone.
    """
    step = tracked_step(checkpoints_dir)
    if step is None:
        return None
    # Looked for twice: between the two looks a save may have moved it back from aside.
    found = published(checkpoints_dir).get(step) or published(checkpoints_dir).get(step)
    if found is None:
        raise CheckpointError(
            f"{checkpoints_dir / TRACKER} names step {step}, but {checkpoint_path(checkpoints_dir, step)} does not "
            f"exist; restore it, or write the step of one of {_names(checkpoints_dir)} into the tracker"
        )
    return found


def published(checkpoints_dir: Path) -> dict[int, Path]:
    """Step -> directory of everything that was published, whole or not, in the order of steps.

    One that is aside counts where its successor has not taken its place.
    """
    found: dict[int, Path] = {}
    names = sorted(os.listdir(checkpoints_dir)) if checkpoints_dir.is_dir() else []
    for name in names:  # ".old-iter_" comes before "iter_"
        if (matched := PUBLISHED.fullmatch(name)) and (checkpoints_dir / name).is_dir():
            found[int(matched[1])] = checkpoints_dir / name
    return dict(sorted(found.items()))


def _write_tracker(checkpoints_dir: Path, step: int) -> None:
    """Let the tracker name ``step``: one rename, so that it is never half written."""
    temporary = checkpoints_dir / f".tmp-{TRACKER}"
    write_synced(temporary, f"{step}\n")
    temporary.replace(checkpoints_dir / TRACKER)
    sync(checkpoints_dir)


def _tidy(checkpoints_dir: Path) -> None:
    """Remove what killed saves left, and put a checkpoint back that was aside without a successor."""
    for pattern in (".tmp-iter_*", ".gone-iter_*"):
        for leftover in checkpoints_dir.glob(pattern):
            shutil.rmtree(leftover)
    for aside in checkpoints_dir.glob(".old-iter_*"):
        final = checkpoints_dir / aside.name.removeprefix(".old-").rpartition("-")[0]
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    sync(checkpoints_dir)


def _names(checkpoints_dir: Path) -> str:
    """Names of the published checkpoints, for an error message."""
    return ", ".join(path.name for path in published(checkpoints_dir).values()) or "(there is none)"
