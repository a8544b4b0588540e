"""The newest checkpoint that is whole: what a run resumes from when the newest of all is not. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest, publish
from megatron_slm.train.run_directory import stored_identity
from megatron_slm.train.saved_state import STATE_FILE, SavedState, read_state


class Recovered(NamedTuple):
    """A verified checkpoint, and, where it is not the one that should have been used, what was wrong with that."""

    path: Path
    state: SavedState
    warning: str | None


def newest_whole(checkpoints_dir: Path, *, identity: str | None, hashes: bool = True) -> Recovered | None:
    """The checkpoint that the tracker names, or the newest before it that is what was saved. Changes nothing.

    Where the tracker is missing, damaged, or names a checkpoint that is not there, the newest of all are tried.

    Args:
        identity: of the run; None where it is not known.
        hashes: read every byte; without it only presence and sizes are compared.

    Returns:
        None where nothing has been published.

    Raises:
        CheckpointError: none is whole; says of each what is wrong.
    """
    there = publish.published(checkpoints_dir)
    wrong: list[str] = []
    try:
        named = publish.tracked_step(checkpoints_dir)
        if named is None and there:
            wrong.append(f"{publish.TRACKER} is missing")
        elif named is not None and named not in there:
            wrong.append(f"{publish.TRACKER} names step {named}, which is not there")
    except CheckpointError as error:
        named = None
        wrong.append(str(error).partition(";")[0])
    if not there and not wrong:
        return None
    start = named if named in there and named is not None else max(there, default=0)
    for step in sorted((step for step in there if step <= start), reverse=True):
        problem, state = _examined(there[step], step, identity, hashes)
        if state is not None:
            lost = max(start, named or 0) - step
            return Recovered(there[step], state, _warning(wrong, there[step], lost) if wrong else None)
        wrong.append(f"{there[step].name}: {problem}")
    raise CheckpointError(
        "\n".join(
            [
                f"{checkpoints_dir} holds no whole checkpoint:",
                *(f"  {line}" for line in wrong),
                "Restore one of them, or start the run anew with --fresh.",
            ]
        )
    )


def find(path: Path, *, hashes: bool = True) -> Recovered:
    """The checkpoint that ``path`` means, verified: an iter_NNNNNNN directory, a checkpoints or a run's directory.

    One that is named itself must be whole; of a run the newest that is whole is taken.

    Raises:
        CheckpointError: there is none, or what is named is damaged.
    """
    if (path / STATE_FILE).exists() or (path / manifest.MANIFEST).exists():
        manifest.verify(path, hashes=hashes)
        return Recovered(path, read_state(path), None)
    for directory, run in ((path / "checkpoints", path), (path, path.parent)):
        if found := newest_whole(directory, identity=stored_identity(run), hashes=hashes):
            return found
    raise CheckpointError(f"{path} holds no checkpoint: name a run's directory or one of its iter_NNNNNNN directories")


def _examined(path: Path, step: int, identity: str | None, hashes: bool) -> tuple[str, SavedState | None]:
    """What is wrong with a checkpoint in one line, or its state."""
    if found := manifest.problems(path, identity=identity, hashes=hashes):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return found[0] + more, None
    try:
        state = read_state(path)
    except CheckpointError as error:
        return str(error), None
    if state.step != step:
        return f"its state is of step {state.step}", None
    return "", state


def _warning(wrong: list[str], used: Path, lost: int) -> str:
    again = f"; the {lost} step{'s' * (lost > 1)} after it will be made again" if lost else ""
    return f"not used: {'; '.join(wrong)}. Used instead: {used.name}{again}."
