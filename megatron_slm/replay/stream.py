"""``replay/rank_NNNNN.stream``: what one rank's steps were, 24 bytes a tensor, as it came by. No torch.

A frame is one step, written and flushed at once:

    header    "MSF1", number of records (u32), step (i64), flags (u32), crc32 of the records (u32): 24 bytes
    records   phase (u8), 0 (u8), micro-batch (u16), name (u32), two lanes (u64 each): 24 bytes each

All little-endian. ``rank_NNNNN.names`` beside it has one name a line; a record's name is the number of its line. Names
are written before the frame that uses them. Whatever a killed process has left half-written at the end of either file
is no frame and no name: a reader passes over it, and the next writer cuts it off.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import CheckpointError

MAGIC = b"MSF1"
HEADER = struct.Struct("<4sIqII")
RECORD = np.dtype(
    [("phase", "u1"), ("reserved", "u1"), ("micro_batch", "<u2"), ("name", "<u4"), ("lanes", "<u8", (2,))]
)
Records = NDArray[np.void]


class Phase(IntEnum):
    """Where in a step a tensor was read; in the order in which a step comes by."""

    BATCH = 0
    RNG = 1
    OUTPUT = 2
    LOSS = 3
    OUTPUT_GRADIENT = 4
    LOCAL_GRADIENT = 5
    """Before the reduction over data-parallel ranks."""
    GRADIENT = 6
    """Reduced, not clipped; what this rank updates with."""
    OPTIMIZER = 7
    PARAMETER = 8
    STEP = 9
    """Not tensors but the step's own numbers: see :class:`recorder.Recorder`."""
    OPERATION = 10


class Flag(IntFlag):
    """What a frame is beside a whole step."""

    ROOTS = 1
    """One record a phase, the digest of all of that phase's records."""
    SKIPPED = 2
    """The batch was rejected: no update."""
    UNFINISHED = 4
    """The run has ended with an error during this step."""
    START = 8
    """Not a step: the state with which a process began behind this step, new, restored or rolled back to."""


class Frame(NamedTuple):
    """One step of one rank; ``records`` has fields of ``RECORD``."""

    step: int
    flags: Flag
    records: Records


def stream_path(folder: Path, rank: int) -> Path:
    """A rank's frames."""
    return folder / f"rank_{rank:05d}.stream"


def names_path(folder: Path, rank: int) -> Path:
    """A rank's names."""
    return folder / f"rank_{rank:05d}.names"


def ranks_in(folder: Path) -> list[int]:
    """The ranks that have a stream in ``folder``."""
    found = (re.fullmatch(r"rank_(\d{5})\.stream", path.name) for path in folder.glob("rank_*.stream"))
    return sorted(int(match[1]) for match in found if match)


def read_names(path: Path) -> list[str]:
    """Whole lines alone; none where there is no file.

    Raises:
        CheckpointError: it is no text.
    """
    if not path.exists():
        return []
    text, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        return text.decode().split("\n") if text else []
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Record the run again (--fresh).") from error


def require_names(path: Path, frame: Frame, names: Sequence[str]) -> None:
    """Refuse a frame that has records without a name.

    Args:
        path: where ``names`` were read from.

    Raises:
        CheckpointError: names are missing.
    """
    if Flag.ROOTS in frame.flags or not len(frame.records):
        return  # a root has none
    wanted = int(frame.records["name"].max()) + 1
    if wanted > len(names):
        raise CheckpointError(
            f"{path} is damaged: it holds {len(names)} whole names, and step {frame.step} has records of {wanted}. "
            "Record the run again (--fresh)."
        )


def read_frames(path: Path) -> Iterator[Frame]:
    """Every whole frame, from the first step on.

    Raises:
        CheckpointError: there is no such stream, or it is damaged before its end.
    """
    for _, frame in _frames(path):
        yield frame


def frame_offsets(path: Path) -> list[tuple[int, int]]:
    """(step, offset behind it) of every whole frame."""
    return [(frame.step, end) for end, frame in _frames(path)]


def roots(frame: Frame, names: Sequence[str]) -> list[tuple[int, tuple[int, int]]]:
    """(phase, its digest) of a frame, in the order in which phases first came; of either kind of frame."""
    if Flag.ROOTS in frame.flags:
        return [(int(record["phase"]), _lanes(record)) for record in frame.records]
    found = []
    phases = frame.records["phase"]
    for phase in dict.fromkeys(phases.tolist()):
        records = frame.records[phases == phase]
        digest = hashlib.blake2b(digest_size=16)
        # By name, not by its number: another run may have met the names in another order.
        digest.update("\n".join(names[number] for number in records["name"]).encode())
        digest.update(records["micro_batch"].tobytes() + records["lanes"].tobytes())
        first, second = struct.unpack("<QQ", digest.digest())
        found.append((phase, (first, second)))
    return found


class StreamWriter:
    """The only writer of one rank's stream."""

    def __init__(self, folder: Path, rank: int, *, step: int) -> None:
        """Open the stream of a run that has made ``step`` steps; what is recorded of later ones goes.

        Raises:
            CheckpointError: the files cannot be written.
        """
        self._path, names = stream_path(folder, rank), names_path(folder, rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = read_names(names)
            self._numbers = {name: number for number, name in enumerate(known)}
            self._names: TextIO = _cut_open(names, sum(len(name.encode()) + 1 for name in known), "utf-8")
            self._stream = self._opened(step)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written ({error}); make room there, or set replay.level=none"
            ) from error

    def number(self, name: str) -> int:
        """The number of a name, which is written if it is new."""
        known = self._numbers.get(name)
        if known is None:
            known = self._numbers[name] = len(self._numbers)
            self._names.write(name + "\n")
        return known

    def write(self, step: int, records: Records, flags: int = 0) -> None:
        """Append one step; it is the system's when this returns, and outlives the process."""
        body = records.tobytes()
        self._names.flush()
        self._stream.write(HEADER.pack(MAGIC, len(records), step, flags, zlib.crc32(body)) + body)
        self._stream.flush()
        self.whole_frames += not flags & Flag.ROOTS

    def rewind(self, step: int) -> None:
        """Forget every frame behind ``step``: those steps will be made again."""
        self._stream.close()
        self._stream = self._opened(step)

    def thin(self, keep: int) -> None:
        """Replace all but the newest ``keep`` frames by their roots. The file is replaced in one rename."""
        self._stream.close()
        names = list(self._numbers)
        frames = list(read_frames(self._path))
        temporary = self._path.with_suffix(".part")
        with temporary.open("wb") as stream:
            for frame in frames[: len(frames) - keep]:
                stream.write(_packed(_thinned(frame, names)))
            for frame in frames[len(frames) - keep :]:
                stream.write(_packed(frame))
        os.replace(temporary, self._path)
        self._stream = self._opened(frames[-1].step if frames else 0)

    def close(self) -> None:
        """Nothing is written any more."""
        self._names.close()
        self._stream.close()

    def _opened(self, step: int) -> BinaryIO:
        """The stream up to ``step``, to be appended to."""
        end, self.whole_frames = 0, 0
        if self._path.exists():
            for offset, frame in _frames(self._path):
                if frame.step > step or Flag.UNFINISHED in frame.flags:
                    break
                if Flag.START in frame.flags and frame.step == step:
                    break  # this start writes its own
                end = offset
                self.whole_frames += Flag.ROOTS not in frame.flags
        stream = self._path.open("ab")
        stream.truncate(end)
        return stream


def records_of(entries: Sequence[tuple[int, int, int]], lanes: NDArray[np.uint64]) -> Records:
    """Records of (phase, micro-batch, name) and their lanes [entries, 2]."""
    records = np.zeros(len(entries), dtype=RECORD)
    if len(entries):
        columns = np.array(entries, dtype=np.int64)
        records["phase"], records["micro_batch"], records["name"] = columns.T
        records["lanes"] = lanes
    return records


def _frames(path: Path) -> Iterator[tuple[int, Frame]]:
    """(offset behind it, frame) of every whole frame."""
    try:
        size = path.stat().st_size
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); is this a recorded run? (train --record layer)"
        ) from error
    with stream:
        while len(header := stream.read(HEADER.size)) == HEADER.size:
            magic, count, step, flags, crc = HEADER.unpack(header)
            end = stream.tell() + count * RECORD.itemsize
            body = stream.read(min(count * RECORD.itemsize, size)) if magic == MAGIC else b""
            if magic != MAGIC or len(body) < count * RECORD.itemsize or zlib.crc32(body) != crc:
                if magic == MAGIC and end >= size:
                    return  # the frame that a killed process was writing
                raise CheckpointError(
                    f"{path} is damaged {stream.tell() - len(body) - HEADER.size} bytes in, and whole before. "
                    "Record the run again (--fresh)."
                )
            yield stream.tell(), Frame(step, Flag(flags), np.frombuffer(body, dtype=RECORD))


def _thinned(frame: Frame, names: Sequence[str]) -> Frame:
    found = roots(frame, names)
    records = np.zeros(len(found), dtype=RECORD)
    for record, (phase, lanes) in zip(records, found, strict=True):
        record["phase"], record["lanes"] = phase, lanes
    return frame._replace(flags=frame.flags | Flag.ROOTS, records=records)


def _packed(frame: Frame) -> bytes:
    body = frame.records.tobytes()
    return HEADER.pack(MAGIC, len(frame.records), frame.step, frame.flags, zlib.crc32(body)) + body


def _lanes(record: np.void) -> tuple[int, int]:
    first, second = record["lanes"].tolist()
    return first, second


def _cut_open(path: Path, size: int, encoding: str) -> TextIO:
    """A text file cut to its first ``size`` bytes, to be appended to."""
    stream = path.open("a", encoding=encoding, newline="\n")
    stream.truncate(size)
    return stream
