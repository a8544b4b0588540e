"""A step of one rank, replayed: how much is alive at every turn of the schedule, and what at the worst moment."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.memory.exchange import held
from megatron_slm.memory.rank import RankTrace
from megatron_slm.memory.schedule import BACKWARD, FORWARD, Turn, turns
from megatron_slm.memory.trace import Block, Phase


class Course(NamedTuple):
    """What a phase does to the bytes alive: at its end, at its worst, and after which event that is."""

    net: int
    peak: int
    position: int


class Moment(NamedTuple):
    """One turn: bytes alive when it begins, the most while it lasts, and tensors that the schedule holds meanwhile."""

    turn: Turn
    start_bytes: int
    peak_bytes: int
    exchanged: int = 0


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
    courses = {key: course(phase, trace.blocks) for key, phase in trace.phases.items()}
    static = sum(part.size for part in trace.static)
    alive = static + sum(trace.blocks[block].size for block in trace.persistent)
    alive += number * sum(trace.blocks[block].size for block in trace.batch)
    exchanged = trace.blocks[trace.exchanged].size if trace.exchanged is not None else 0
    place = (trace.pipeline_rank, trace.stages, trace.chunks, number)
    moments = []
    for turn, count in zip(turns(*place), held(*place, frees_outputs=trace.frees_outputs), strict=True):
        taken = courses[turn.name, turn.chunk]
        start = alive + count * exchanged
        moments.append(Moment(turn, start, start + taken.peak, count))
        alive += taken.net
    worst = max(range(len(moments)), key=lambda index: moments[index].peak_bytes)
    return Timeline(moments, static, worst, number)


def course(phase: Phase, blocks: list[Block]) -> Course:
    """The bytes of a phase's events, added up; what it leaves to the schedule counts until its end."""
    sizes = [blocks[event].size if event >= 0 else -blocks[~event].size for event in phase.events]
    running = list(itertools.accumulate(sizes, initial=0))
    position = max(range(len(running)), key=running.__getitem__)
    left = blocks[phase.output].size if phase.output is not None else 0
    return Course(running[-1] - left, running[position], position)


def alive_at_worst(trace: RankTrace, timeline: Timeline) -> Counter[int]:
    """How many copies of every block that is not static are alive at the worst moment.

    The blocks that a forward pass leaves exist once for every micro-batch whose backward pass has not been.
    """
    count = Counter(trace.persistent)
    count.update(dict.fromkeys(trace.batch, timeline.micro_batches))
    for moment in timeline.moments[: timeline.worst]:
        phase = trace.phases[moment.turn.name, moment.turn.chunk]
        _apply(count, [event for event in phase.events if event != phase.output])
    worst = timeline.moments[timeline.worst]
    phase = trace.phases[worst.turn.name, worst.turn.chunk]
    _apply(count, phase.events[: course(phase, trace.blocks).position])
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
