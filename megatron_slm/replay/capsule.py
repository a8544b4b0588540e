"""``runs/NAME/replay/``: what a run has recorded of itself, to be read. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from megatron_slm.errors import CheckpointError
from megatron_slm.replay import stream
from megatron_slm.replay.stream import Frame

FOLDER = "replay"


class Manifest(dict[str, Any]):
    """A manifest, or a part of one: a key that it lacks names the file."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """Take over what was read."""
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is damaged: it holds no {key}. Record the run again (--fresh).")


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
        require_directory(path)
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
        """A rank's frames in their order.

        Raises:
            CheckpointError: there is no stream, or it or its names are damaged.
        """
        names = self.names(rank)
        for frame in stream.read_frames(stream.stream_path(self.folder, rank)):
            stream.require_names(stream.names_path(self.folder, rank), frame, names)
            yield frame

    @property
    def starts(self) -> list[int]:
        """Completed steps behind which the run was started."""
        found = self.folder.glob(f"manifest_{'[0-9]' * 7}.json")
        return sorted(int(path.stem.split("_")[1]) for path in found)

    @property
    def missing(self) -> list[int]:
        """The ranks that the run had, and of which there is no stream."""
        layouts = [self.manifest(step + 1)["groups"]["pp"] for step in self.starts or [0]]
        return sorted({rank for layout in layouts for group in layout for rank in group} - {*self.ranks})

    def require_streams(self) -> None:
        """Refuse a recording of which a rank's stream has gone.

        Raises:
            CheckpointError: names the ranks.
        """
        if missing := self.missing:
            ranks = ", ".join(map(str, missing))
            raise CheckpointError(
                f"{stream.stream_path(self.folder, missing[0])} is missing: there is no stream of rank {ranks}, which "
                "the run had. Put it back, or record the run again (--fresh)."
            )

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
            text = found[-1].read_text(encoding="utf-8")
            manifest: Any = json.loads(text, object_hook=lambda content: Manifest(found[-1], content))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{found[-1]} is damaged ({error}); record the run again.") from error
        if not isinstance(manifest, Manifest):
            raise CheckpointError(f"{found[-1]} is damaged: it holds no JSON object. Record the run again (--fresh).")
        return manifest


def require_directory(path: Path) -> None:
    """Refuse a run that is not there.

    Raises:
        CheckpointError: there is no such directory.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory; name that of a run, as runs/NAME.")


def run_path(folder: Path, step: int) -> Path:
    """The run's manifest of a start behind ``step``."""
    return folder / f"manifest_{step:07d}.json"


def rank_path(folder: Path, rank: int, step: int) -> Path:
    """A rank's manifest of a start behind ``step``."""
    return folder / f"manifest_{step:07d}_rank_{rank:05d}.json"
