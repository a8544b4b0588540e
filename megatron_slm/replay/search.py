"""The first frame in which two streams of one rank part, found from few of them. No torch.

A difference in parameters or optimizer usually stays. Then it is there in the last frame that both streams have, and
the first frame with it is found by halving: log2(frames) of them are read and compared by the roots of their state.
That no earlier frame differs is not taken from this, since a difference may also be absorbed: the checksums in the
headers of all earlier frames are compared (a difference escapes one with a chance of 2**-32), and where those differ,
or cannot be compared because the streams number their names otherwise, the frames themselves. Where the last state is
equal, every frame is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from megatron_slm.errors import CheckpointError
from megatron_slm.replay.stream import HEADER, MAGIC, RECORD, Flag, Frame, Phase, require_names, roots

Found = TypeVar("Found")
STATE = (Phase.OPTIMIZER, Phase.PARAMETER)


class Place(NamedTuple):
    """A frame, by its header alone."""

    step: int
    flags: Flag
    checksum: int
    records: int
    offset: int
    """Of its records."""

    @property
    def key(self) -> tuple[int, bool]:
        """What frames of two runs are compared by; a start comes behind its step."""
        return self.step, Flag.START in self.flags


class Search(NamedTuple, Generic[Found]):
    """What was found: in which pair of frames they part and how, and what that has cost.

    Attributes:
        difference: what the comparison has said of the first pair that differs.
        place: of that pair, in the first stream.
        previous: step of the frame before; None where there is none.
        frames: that both streams have.
        read: of these, those whose records were read.
        steps: whether a step is among these frames, whole or not, and not starts alone.
        alone: whole steps that the first stream alone has, and those of the second.
    """

    difference: Found | None
    place: Place | None
    previous: int | None
    frames: int
    read: int
    steps: bool = False
    alone: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


class Streams:
    """Two streams of one rank, of which single frames are read."""

    def __init__(self, paths: tuple[Path, Path], names: tuple[Sequence[str], Sequence[str]]) -> None:
        """Find the frames that both have.

        Raises:
            CheckpointError: a stream is damaged or not there.
        """
        self._paths, self._names = paths, names
        first, second = ({place.key: place for place in places(path)} for path in paths)
        self.pairs = [(first[key], second[key]) for key in sorted({*first} & {*second})]
        here, there = whole_steps(first.values()), whole_steps(second.values())
        self.alone = here - there, there - here
        shared = min(map(len, names))
        self.numbered_alike = list(names[0][:shared]) == list(names[1][:shared])
        self._read: set[int] = set()

    @property
    def read(self) -> int:
        """Pairs of frames that were read so far."""
        return len(self._read)

    def frames(self, index: int) -> tuple[Frame, Frame]:
        """A pair, with its records."""
        self._read.add(index)
        one, other = (read_at(path, place) for path, place in zip(self._paths, self.pairs[index], strict=True))
        for path, frame, names in zip(self._paths, (one, other), self._names, strict=True):
            require_names(path.with_suffix(".names"), frame, names)
        return one, other

    def alike_by_header(self, index: int) -> bool:
        """Whether the headers of a pair say that their records are equal."""
        one, other = self.pairs[index]
        return (one.checksum, one.records, one.flags) == (other.checksum, other.records, other.flags)

    def other_state(self, index: int) -> bool:
        """Whether the roots of the state that a pair has left are not equal."""
        one, other = (
            dict(roots(_state(frame), names)) for frame, names in zip(self.frames(index), self._names, strict=True)
        )
        return any(one[phase] != other[phase] for phase in one.keys() & other.keys())


def search(
    streams: Streams, difference: Callable[[Frame, Frame], Found | None], *, halving: bool = True
) -> Search[Found]:
    """The first pair of frames that differ.

    Args:
        difference: compares two frames of one step record by record; None if they are equal.
        halving: False where the streams do not hold the same parts of the state, so that its roots say nothing.
    """
    count = len(streams.pairs)
    steps = any(Flag.START not in first.flags for first, _ in streams.pairs)
    end = _first_other_state(streams) if halving else None
    begin = 0
    if end is not None and streams.numbered_alike:
        begin = next((index for index in range(end) if not streams.alike_by_header(index)), end)
    for index in range(begin, count if end is None else end + 1):
        if (found := difference(*streams.frames(index))) is not None:
            previous = streams.pairs[index - 1][0].step if index else None
            return Search(found, streams.pairs[index][0], previous, count, streams.read, steps, streams.alone)
    return Search(None, None, None, count, streams.read, steps, streams.alone)


def whole_steps(found: Iterable[Place]) -> frozenset[int]:
    """The steps among frames that were recorded to their end."""
    return frozenset(place.step for place in found if not place.flags & (Flag.START | Flag.UNFINISHED))


def places(path: Path) -> list[Place]:
    """Every whole frame of a stream, by its header.

    Raises:
        CheckpointError: there is no such stream, or it is damaged.
    """
    found = []
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            while len(header := stream.read(HEADER.size)) == HEADER.size:
                magic, count, step, flags, checksum = HEADER.unpack(header)
                offset = stream.tell()
                if magic != MAGIC:
                    raise CheckpointError(f"{path} is damaged {offset - HEADER.size} bytes in; record the run again.")
                if offset + count * RECORD.itemsize > size:
                    break  # the frame that a killed process was writing
                found.append(Place(step, Flag(flags), checksum, count, offset))
                stream.seek(count * RECORD.itemsize, 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is this a recorded run?") from error
    return found


def read_at(path: Path, place: Place) -> Frame:
    """One frame.

    Raises:
        CheckpointError: it is damaged.
    """
    with path.open("rb") as stream:
        stream.seek(place.offset)
        body = stream.read(place.records * RECORD.itemsize)
    if zlib.crc32(body) != place.checksum:
        raise CheckpointError(f"{path} is damaged at step {place.step}, and whole before. Record the run again.")
    return Frame(place.step, place.flags, np.frombuffer(body, dtype=RECORD))


def _first_other_state(streams: Streams) -> int | None:
    """The first pair with another state behind one with the same, if the last one has another."""
    last = len(streams.pairs) - 1
    while last >= 0 and any(Flag.UNFINISHED in place.flags for place in streams.pairs[last]):
        last -= 1  # it ended before it had left any state
    if last < 0 or not streams.other_state(last):
        return None
    same, other = -1, last
    while other - same > 1:
        middle = (same + other) // 2
        if streams.other_state(middle):
            other = middle
        else:
            same = middle
    return other


def _state(frame: Frame) -> Frame:
    return frame._replace(records=frame.records[np.isin(frame.records["phase"], STATE)])
