"""A step of one rank, replayed: how much is alive at every turn of the schedule, and what at the worst moment."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.memory.exchange import held
from megatron_slm.memory.rank import RankTrace
from megatron_slm.memory.schedule import BACKWARD, FORWARD, Turn, turns


class Course(NamedTuple):
    """What a phase does to the bytes alive.

    Attributes:
        net: from its begin to its end, without persistent blocks and what it leaves to the schedule.
        peak: the most while it lasts, above those at its begin.
        until_worst: its events until then.
        lasting: those of ``net``.
        present: persistent blocks that are there at its end.
    """

    net: int
    peak: int
    until_worst: list[int]
    lasting: list[int]
    present: frozenset[int]


class Moment(NamedTuple):
    """One turn of a step.

    Attributes:
        start_bytes: alive when it begins.
        peak_bytes: the most while it lasts.
        exchanged: tensors between pipeline ranks that the schedule holds meanwhile.
        present: persistent blocks that are there when it begins.
    """

    turn: Turn
    start_bytes: int
    peak_bytes: int
    exchanged: int = 0
    present: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Timeline:
    """All turns of a step.

    Attributes:
        static_bytes: what exists between steps.
        worst: index of the turn in which the most is alive.
        micro_batches: of the step.
    """

    moments: list[Moment]
    static_bytes: int
    worst: int
    micro_batches: int = 1

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return self.moments[self.worst].peak_bytes


def replay(trace: RankTrace, micro_batches: int | None = None) -> Timeline:
    """Play the schedule of a step.

    Args:
        micro_batches: of the step; default the traced configuration's.
    """
    number = micro_batches or trace.micro_batches
    sizes = [block.size for block in trace.blocks]
    static = sum(part.size for part in trace.static)
    alive = static + number * sum(sizes[block] for block in trace.batch)
    exchanged = sizes[trace.exchanged] if trace.exchanged is not None else 0
    place = (trace.pipeline_rank, trace.stages, trace.chunks, number)
    present, courses, moments = frozenset(trace.persistent), _Courses(trace), []
    for turn, count in zip(turns(*place), held(*place, frees_outputs=trace.frees_outputs), strict=True):
        taken = courses.of(turn, present)
        start = alive + count * exchanged + sum(sizes[block] for block in present)
        moments.append(Moment(turn, start, start + taken.peak, count, present))
        alive += taken.net
        present = taken.present
    worst = max(range(len(moments)), key=lambda index: moments[index].peak_bytes)
    return Timeline(moments, static, worst, number)


class _Courses:
    """What each phase does, by what a micro-batch finds there."""

    def __init__(self, trace: RankTrace) -> None:
        self._trace = trace
        self._known: dict[tuple[str, int, frozenset[int]], Course] = {}

    def of(self, turn: Turn, present: frozenset[int]) -> Course:
        """The course of one turn."""
        key = (turn.name, turn.chunk, present)
        if key not in self._known:
            self._known[key] = course(self._trace, turn, present)
        return self._known[key]


def course(trace: RankTrace, turn: Turn, present: frozenset[int]) -> Course:
    """The bytes of a phase's events, added up.

    Args:
        present: those of the persistent blocks that are there when it begins.
    """
    phase = trace.phases[turn.name, turn.chunk]
    events, present = effective(phase.events, frozenset(trace.persistent), present)
    sizes = [trace.blocks[event].size if event >= 0 else -trace.blocks[~event].size for event in events]
    running = list(itertools.accumulate(sizes, initial=0))
    position = max(range(len(running)), key=running.__getitem__)
    lasting = [event for event in events if event != phase.output]
    lasting = [event for event in lasting if (event if event >= 0 else ~event) not in trace.persistent]
    net = sum(trace.blocks[event].size if event >= 0 else -trace.blocks[~event].size for event in lasting)
    return Course(net, running[position], events[:position], lasting, present)


def effective(
    events: list[int], persistent: frozenset[int], present: frozenset[int]
) -> tuple[list[int], frozenset[int]]:
    """The events of a pass that finds ``present``, and which persistent blocks are there afterwards.

    A persistent block is a place that passes fill and empty. One that fills it replaces what is there, if anything; of
    two in a row that empty it, the second one finds nothing.
    """
    filled = persistent.intersection(events)
    emptied = {~event for event in events if event < 0} & persistent
    replaced = filled & (present - emptied)
    kept = [event for event in events if event >= 0 or ~event not in persistent or ~event in present]
    return [*(~block for block in replaced), *kept], (present - emptied) | filled


def alive_at_worst(trace: RankTrace, timeline: Timeline) -> Counter[int]:
    """How many copies of every block that is not static are alive at the worst moment.

    The blocks that a forward pass leaves exist once for every micro-batch whose backward pass has not been.
    """
    courses = _Courses(trace)
    count = Counter(dict.fromkeys(trace.batch, timeline.micro_batches))
    for moment in timeline.moments[: timeline.worst]:
        _apply(count, courses.of(moment.turn, moment.present).lasting)
    worst = timeline.moments[timeline.worst]
    count.update(worst.present)
    _apply(count, courses.of(worst.turn, worst.present).until_worst)
    if trace.exchanged is not None:
        count[trace.exchanged] += worst.exchanged
    return +count


def saved_blocks(trace: RankTrace) -> dict[int, int]:
    """Block -> chunk, of everything that a forward pass leaves for its backward pass."""
    found: dict[int, int] = {}
    for (name, chunk), phase in trace.phases.items():
        if name == FORWARD:
            made = {event for event in phase.events if event >= 0}
            found |= dict.fromkeys(made - {~event for event in phase.events if event < 0}, chunk)
    return found


def in_flight(timeline: Timeline) -> Counter[int]:
    """Micro-batches of each chunk whose activations are held when the worst turn begins."""
    count: Counter[int] = Counter()
    for moment in timeline.moments[: timeline.worst]:
        count[moment.turn.chunk] += {FORWARD: 1, BACKWARD: -1}.get(moment.turn.name, 0)
    return +count


def _apply(count: Counter[int], events: list[int]) -> None:
    for event in events:
        if event >= 0:
            count[event] += 1
        else:
            count[~event] -= 1
