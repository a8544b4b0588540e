"""``replay/places_STEP_rank_NNNNN.json``: where in the source the operations of a step were called. No torch.

A table of places and, for every record of an operation in that step's frame, in their order, the number of its place.
A step that is made again replaces the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import CheckpointError


class Place(NamedTuple):
    """A line of source.

    Attributes:
        file: relative to where it is imported from, as ``megatron/core/transformer/mlp.py``.
        text: the line as it was when it ran; empty where it could not be read.
        backward: not that line was running but the gradient of what it had computed.
    """

    file: str
    line: int
    function: str
    text: str
    backward: bool = False

    def __str__(self) -> str:
        of = "the gradient of " if self.backward else ""
        return f"{of}{self.file}:{self.line} in {self.function}"


def path_of(folder: Path, step: int, rank: int) -> Path:
    """A rank's places of one step."""
    return folder / f"places_{step:07d}_rank_{rank:05d}.json"


def write(path: Path, table: Sequence[Place], numbers: Sequence[int]) -> None:
    """Replace the places of a step in one rename; ``numbers`` are places in ``table``, one a record.

    Raises:
        CheckpointError: they cannot be written.
    """
    temporary = path.with_suffix(".part")
    try:
        temporary.write_text(json.dumps({"table": list(table), "records": list(numbers)}) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}); make room there, or set replay.level=layer"
        ) from error


def read(path: Path) -> list[Place]:
    """The place of every record of an operation; none where the step was recorded without.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = [Place(*entry) for entry in found["table"]]
        return [table[number] for number in found["records"]]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); make the step again.") from error
