"""``runs/NAME/replay/``: what a run has recorded of itself, to be read. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_slm.errors import CheckpointError
from megatron_slm.replay import stream
from megatron_slm.replay.stream import Frame

FOLDER = "replay"


@dataclass(frozen=True)
class Capsule:
    """One run's recording."""

    folder: Path

    @staticmethod
    def of(path: Path) -> Capsule:
        """The recording in a run's directory, or in its ``replay/``.

        Raises:
            CheckpointError: there is none.
        """
        for folder in (path / FOLDER, path):
            if stream.ranks_in(folder):
                return Capsule(folder)
        raise CheckpointError(f"{path} holds no recording; record a run with mslm train ... --record layer.")

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks that have recorded something."""
        return stream.ranks_in(self.folder)

    def names(self, rank: int) -> list[str]:
        """Names by their number."""
        return stream.read_names(stream.names_path(self.folder, rank))

    def frames(self, rank: int) -> Iterator[Frame]:
        """A rank's frames in their order."""
        return stream.read_frames(stream.stream_path(self.folder, rank))

    def manifest(self, step: int, rank: int | None = None) -> dict[str, Any]:
        """The manifest of the run, or of a rank, under which ``step`` was made: of the last start before it.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        ending = "" if rank is None else f"_rank_{rank:05d}"
        starts = sorted(self.folder.glob(f"manifest_{'[0-9]' * 7}{ending}.json"))
        found = [path for path in starts if int(path.stem.split("_")[1]) < step] or starts[:1]
        if not found:
            raise CheckpointError(f"{self.folder} holds no manifest{ending}.json; its recording is not whole.")
        try:
            manifest: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{found[-1]} is damaged ({error}); record the run again.") from error
        return manifest


def run_path(folder: Path, step: int) -> Path:
    """The run's manifest of a start behind ``step``."""
    return folder / f"manifest_{step:07d}.json"


def rank_path(folder: Path, rank: int, step: int) -> Path:
    """A rank's manifest of a start behind ``step``."""
    return folder / f"manifest_{step:07d}_rank_{rank:05d}.json"
