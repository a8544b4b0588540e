"""Which checkpoints the frozen models of a run are of: noted when it begins, the same ones whenever it goes on.

A run that is named may have trained on since. What was noted is in the run's records, and so in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest, recovery

RECORD = "parents"
PRETRAINED = "checkpoint.pretrained_checkpoint"

T = TypeVar("T")


class Parent(NamedTuple):
    """A checkpoint: its directory, resolved, and the sha256 of its manifest, which holds those of all its files."""

    path: str
    manifest: str


def note(records: dict[str, Any], key: str, path: Path) -> Parent:
    """Note in a run's records that the model of the option ``key`` is the checkpoint ``path``."""
    parent = Parent(str(path.resolve()), manifest.sha256(path / manifest.MANIFEST))
    records[RECORD] = {**records.get(RECORD, {}), key: parent._asdict()}
    return parent


def noted(records: dict[str, Any], key: str, named: str) -> Parent:
    """The checkpoint that a run began with, whether or not it is still there; found and noted at its begin. Collective.

    Args:
        records: of the state, the same on every rank.
        key, named: the option and its value.

    Raises:
        CheckpointError: on every rank; nothing was noted, and ``named`` holds no whole checkpoint.
    """
    if key in records.get(RECORD, {}):
        return Parent(**records[RECORD][key])
    return note(records, key, Path(_of_first_rank(lambda: str(recovery.find(Path(named)).path))))


def checkpoint_of(records: dict[str, Any], key: str, named: str) -> Path:
    """The checkpoint that a run began with, verified. Collective; see :func:`noted`.

    Raises:
        CheckpointError: on every rank; it is gone or is another by now.
    """
    parent = noted(records, key, named)
    return Path(_of_first_rank(lambda: str(still_there(parent, key, named))))


def still_there(parent: Parent, key: str, named: str) -> Path:
    """Where ``parent`` lies: where it was, or where ``named`` says that its run has been moved to. One rank alone.

    Raises:
        CheckpointError: there is nothing, or another checkpoint.
    """
    path, given = Path(parent.path), Path(named).resolve()
    inside = given in (path, *path.parents)
    places = (path,) if inside else (given, given / path.name, given / "checkpoints" / path.name)
    for place in places:
        file = place / manifest.MANIFEST
        if file.is_file() and manifest.sha256(file) == parent.manifest:
            manifest.verify(place)
            return place
    raise CheckpointError(
        f"{key} = {named} does not hold the checkpoint that this run began with any more ({path}, manifest "
        f"{parent.manifest[:12]}): put it back, name the directory it was moved to, or start anew with --fresh"
    )


def _of_first_rank(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: two that looked for themselves could find two checkpoints. Collective."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [find(), None]
        except CheckpointError as error:
            told = [None, str(error)]
    dist.broadcast_object_list(told, src=0)
    found, problem = told
    if problem is not None:
        raise CheckpointError(problem)
    result: T = found
    return result
