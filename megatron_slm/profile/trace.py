"""What was recorded of one rank, whichever profiler recorded it: ranges, work and exchanges. No torch.

Times are nanoseconds of that rank's clock. ``issued`` is when the host asked for something that a device did later; on
a CPU it is its start.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_slm.profile import names


class Range(NamedTuple):
    """A range of ``names.py``."""

    start: int
    end: int
    kind: str
    name: str


class Work(NamedTuple):
    """A kernel, or an operator on a CPU.

    Attributes:
        own: nanoseconds without the operators that it has called.
        outermost: no other operator has called it.
        lane: stream or thread.
    """

    start: int
    end: int
    issued: int
    name: str
    own: int
    outermost: bool
    lane: str


class Exchange(NamedTuple):
    """Data on its way between ranks, or a rank that waits for it."""

    start: int
    end: int
    issued: int
    operation: str
    axis: str
    size: int


@dataclass
class RankTrace:
    """What was recorded of one rank.

    Attributes:
        on_gpu: whether work and exchanges are a device's.
        notes: what a reader of the report should know about the file.
    """

    rank: int
    source: str
    on_gpu: bool = False
    host: str = ""
    ranges: list[Range] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """Where in a step something happens; empty where nothing says it."""

    step: str = ""
    phase: str = ""
    micro_batch: str = ""
    module: str = ""

    def entered(self, kind: str, name: str) -> Place:
        """Inside of one more range."""
        if kind == names.STEP:
            return Place(name)
        if kind == names.PHASE:
            return Place(self.step, name)
        if kind == names.MICRO_BATCH:
            return Place(self.step, self.phase, name)
        return self._replace(module=name)


NOWHERE = Place()


class Segment(NamedTuple):
    """A stretch of time within one place."""

    start: int
    end: int
    place: Place


def segments(ranges: Iterable[Range]) -> list[Segment]:
    """Time divided by the innermost ranges, in order; what lies in no range is left out."""
    found: list[Segment] = []
    stack: list[tuple[int, Place]] = []
    at = 0

    def until(moment: int) -> None:
        nonlocal at
        while stack and stack[-1][0] <= moment:
            end, place = stack.pop()
            if end > at:
                found.append(Segment(at, end, place))
                at = end
        if stack and moment > at:
            found.append(Segment(at, moment, stack[-1][1]))
        at = max(at, moment)

    divided = (one for one in ranges if one.kind not in (names.COLLECTIVE, names.RANK))
    for one in sorted(divided, key=lambda one: (one.start, -one.end)):
        until(one.start)
        inside = stack[-1][1] if stack else NOWHERE
        # A range that outlives the one it is in would otherwise cover what comes behind that.
        end = min(one.end, stack[-1][0]) if stack else one.end
        stack.append((end, inside.entered(one.kind, one.name)))
    until(max((end for end, _ in stack), default=0))
    return found


class Places:
    """Answers where something happens."""

    def __init__(self, divided: Sequence[Segment]) -> None:
        self._divided = divided
        self._starts = [segment.start for segment in divided]

    def at(self, moment: int) -> Place:
        """The place of a moment."""
        index = bisect_right(self._starts, moment) - 1
        if index >= 0 and moment < self._divided[index].end:
            return self._divided[index].place
        return NOWHERE
