"""When every stage of a pipeline does what: the schedule played through with seconds. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.memory.schedule import BACKWARD, FORWARD, turns

SETTLED = (2, 3)
"""Rounds of as many micro-batches as there are stages, after which each further round takes as long as the last."""


@dataclass(frozen=True)
class Chunk:
    """Seconds of one model chunk for one micro-batch."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Played:
    """What the schedule comes to. Seconds count from the first forward pass.

    Attributes:
        last_backward: ``[stage][chunk]`` -> start and end of its last backward pass.
        busy: ``[stage]`` -> seconds of compute.
        seconds: until the last stage to end has ended.
    """

    last_backward: tuple[tuple[tuple[float, float], ...], ...]
    busy: tuple[float, ...]
    seconds: float

    @property
    def bubble_share(self) -> float:
        """Share of the schedule's time in which a stage, on average, does not compute."""
        return max(0.0, 1.0 - sum(self.busy) / (len(self.busy) * self.seconds))


def play(
    stages: Sequence[Sequence[Chunk]], micro_batches: int, sends: Sequence[float], *, sends_hidden: bool
) -> Played:
    """Core's schedule (1F1B, or interleaved where a stage has several chunks) for one step.

    Many micro-batches are not all played: once the pipeline is full, every further round takes the same time.

    Args:
        stages: ``[stage][chunk]``; every stage has as many chunks.
        micro_batches: of one replica in one step.
        sends: ``[stage]`` -> seconds of a message from that stage to the next one (of the last one: to the first),
            either way.
        sends_hidden: a sender goes on while its message is under way; else it waits for its end.
    """
    few, more = (rounds * len(stages) for rounds in SETTLED)
    whole = more + (micro_batches - more) % len(stages)
    if micro_batches <= whole:
        return _play(stages, micro_batches, sends, sends_hidden)
    first = _play(stages, few, sends, sends_hidden)
    then = _play(stages, whole, sends, sends_hidden)
    further = (micro_batches - whole) / len(stages)
    last = _play(stages, more, sends, sends_hidden) if whole > more else then
    later = further * (last.seconds - first.seconds)
    work = [further * len(stages) * sum(chunk.forward + chunk.backward for chunk in stage) for stage in stages]
    return Played(
        last_backward=tuple(
            tuple((start + later, end + later) for start, end in chunks) for chunks in then.last_backward
        ),
        busy=tuple(busy + more_work for busy, more_work in zip(then.busy, work, strict=True)),
        seconds=then.seconds + later,
    )


def least_seconds(stages: Sequence[Sequence[Chunk]], micro_batches: int) -> float:
    """What no schedule is faster than. Arguments as of :func:`play`.

    A stage's own work begins when the first micro-batch reaches it, and the last gradient has to reach the first stage.
    """
    before, least = 0.0, 0.0
    for stage in stages:
        work = micro_batches * sum(chunk.forward + chunk.backward for chunk in stage)
        least = max(least, before + work)
        before += stage[0].forward + stage[0].backward
    return least


def _play(stages: Sequence[Sequence[Chunk]], micro_batches: int, sends: Sequence[float], sends_hidden: bool) -> Played:
    """Every pass of every stage, each as soon as its stage is free and its input has arrived."""
    count, chunks = len(stages), len(stages[0])
    todo = [_order(stage, count, chunks, micro_batches) for stage in range(count)]
    position, clock = [0] * count, [0.0] * count
    arrived: dict[tuple[bool, int, int], float] = {}
    ends = [[(0.0, 0.0)] * chunks for _ in stages]
    last = count * chunks - 1
    ready = list(range(count))
    while ready:
        stage = ready.pop()
        while position[stage] < len(todo[stage]):
            forward, chunk, micro_batch = todo[stage][position[stage]]
            place = chunk * count + stage  # of the chunk in the model
            # The model's first chunk waits for nobody, and its last one turns round on its own output.
            waits = place != (0 if forward else last)
            after = arrived.get((forward, place, micro_batch)) if waits else 0.0
            if after is None:
                break
            start = max(clock[stage], after)
            seconds = stages[stage][chunk]
            end = start + (seconds.forward if forward else seconds.backward)
            if not forward:
                ends[stage][chunk] = (start, end)
            target = place + 1 if forward else place - 1
            if 0 <= target <= last:
                message = sends[stage] if forward else sends[(stage - 1) % count]
                arrived[forward, target, micro_batch] = end + message
                ready.append(target % count)
                end += 0.0 if sends_hidden else message
            clock[stage] = end
            position[stage] += 1
    busy = tuple(micro_batches * sum(chunk.forward + chunk.backward for chunk in stage) for stage in stages)
    return Played(tuple(map(tuple, ends)), busy, max(end for stage in ends for _, end in stage))


@functools.lru_cache(maxsize=4096)
def _order(stage: int, stages: int, chunks: int, micro_batches: int) -> tuple[tuple[bool, int, int], ...]:
    """Core's order as (is forward, chunk, micro-batch)."""
    return tuple(
        (turn.name == FORWARD, turn.chunk, turn.micro_batch)
        for turn in turns(stage, stages, chunks, micro_batches)
        if turn.name in (FORWARD, BACKWARD)
    )
