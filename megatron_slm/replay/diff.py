"""The first place where two recorded runs of one layout part: step, rank, phase, module, tensor. No torch.

Ranks are compared one to one, frame by frame, up to each rank's first difference. Of the ranks that differ in the first
step of all, the one whose difference came first in that step is where it began:

    the phase      batch, random states, forward and backward, gradients before and after reduction, optimizer ...
    within it      the earlier micro-batch; forward the earlier pipeline stage, backward the later; the earlier record

Ranks of one pipeline stage keep their records in one order, so that the numbers of their records compare.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.search import Search, Streams, search
from megatron_slm.replay.stream import Flag, Frame, Phase, roots, stream_path

ORDER = {
    Phase.BATCH: 0, Phase.RNG: 1, Phase.OUTPUT: 2, Phase.LOSS: 2, Phase.OUTPUT_GRADIENT: 2, Phase.OPERATION: 2,
    Phase.LOCAL_GRADIENT: 3, Phase.GRADIENT: 4, Phase.OPTIMIZER: 5, Phase.PARAMETER: 6, Phase.STEP: 7,
}  # fmt: skip
"""In which order the phases of different ranks can cause one another."""
DIVIDED = {Phase.GRADIENT, Phase.OPTIMIZER, Phase.PARAMETER}
"""What the distributed optimizer divides over ranks along the buckets of gradients."""
WHOLE_PHASE = "(all of the phase: the step was thinned to its roots)"


class Key(NamedTuple):
    """Which record of a frame: ``nth`` of its name, where an operation comes several times."""

    phase: Phase
    micro_batch: int
    name: str
    nth: int


class Differing(NamedTuple):
    """A record that is not the same in two frames, with its lanes; None where a frame has no such record."""

    key: Key
    place: int
    """Of the record in its frame."""
    first: tuple[int, int] | None
    second: tuple[int, int] | None

    @property
    def only_in(self) -> str | None:
        """In which of them alone it is."""
        if self.first is not None and self.second is not None:
            return None
        return "second" if self.first is None else "first"


@dataclass(frozen=True)
class Divergence:
    """The first record of a rank that differs.

    Attributes:
        start: it is not of the step but of the state with which a process began behind it.
        index: the record's place in the frame.
        only_in: "first" or "second" where the other run has no such record.
        previous: the step of the frame before, which was equal in both; None where they have none in common.
        others: ranks that differ in the same step, but later in it.
    """

    step: int
    start: bool
    rank: int
    key: Key
    index: int
    pipeline_rank: int
    pipeline_size: int
    only_in: str | None = None
    previous: int | None = None
    others: tuple[int, ...] = ()

    @property
    def inputs_equal(self) -> bool | None:
        """Whether what the step began with was equal; None where that was not recorded by both."""
        return None if self.start or self.previous != self.step - 1 else True

    @property
    def module(self) -> str:
        """The module the tensor belongs to: of a parameter's name all but its last part."""
        name = self.tensor.partition("[")[0]
        if self.key.phase in (Phase.OUTPUT, Phase.OUTPUT_GRADIENT, Phase.OPERATION) or "." not in name:
            return name
        parts = name.split(".")
        return ".".join(parts[: next((i for i, part in enumerate(parts) if part in ("weight", "bias")), -1)])

    @property
    def tensor(self) -> str:
        """The tensor's name without dtype and shape."""
        return self.key.name.partition(" ")[0]

    def order(self) -> tuple[int, int, int, int, int]:
        """What sorts the ranks' differences of one step as they came by."""
        phase, computed = self.key.phase, ORDER[self.key.phase] == ORDER[Phase.OUTPUT]
        backward = phase is Phase.OUTPUT_GRADIENT
        stage = 2 * self.pipeline_size - 1 - self.pipeline_rank if backward else self.pipeline_rank
        return ORDER[phase], self.key.micro_batch if computed else 0, stage if computed else 0, self.index, self.rank


RankSearch = Search[tuple[Key, int, str | None]]
"""What differs in a rank's first pair of frames that does: :func:`frame_difference`."""


@dataclass(frozen=True)
class Comparison:
    """Of two recordings: where they part, and how many frames of all ranks that both have were read for it."""

    divergence: Divergence | None
    frames: int
    read: int
    alone: tuple[str, ...] = ()
    """Of each run, the steps that the other one has not, in words."""

    def __str__(self) -> str:
        return f"{self.read} of {self.frames} recorded steps of all ranks"


def first_divergence(first: Capsule, second: Capsule) -> Divergence | None:
    """Where the two part; None where every step that both have is equal.

    Raises:
        ConfigError: other ranks or another layout, so that ranks cannot be compared one to one; or a rank without a
            common step.
        CheckpointError: a recording is damaged.
    """
    return compare(first, second).divergence


def compare(first: Capsule, second: Capsule) -> Comparison:
    """The same, with how much had to be read.

    Raises:
        ConfigError: as :func:`first_divergence`.
        CheckpointError: a recording is damaged.
    """
    stages = pipeline_ranks(first, second)
    searches = {rank: rank_search(first, second, rank) for rank in first.ranks}
    frames, read = (sum(getattr(one, name) for one in searches.values()) for name in ("frames", "read"))
    count = max(stages.values()) + 1
    divergences = (_divergence(rank, (stages[rank], count), one) for rank, one in searches.items())
    found = [one for one in divergences if one is not None]
    earliest = min(((one.step, one.start) for one in found), default=None)
    if earliest is None or not earliest[1]:
        _require_common(first, second, searches)
    alone = _alone(first, second, searches)
    if earliest is None:
        return Comparison(None, frames, read, alone)
    candidates = sorted((one for one in found if (one.step, one.start) == earliest), key=Divergence.order)
    others = tuple(one.rank for one in candidates[1:])
    return Comparison(dataclasses.replace(candidates[0], others=others), frames, read, alone)


def pipeline_ranks(first: Capsule, second: Capsule) -> dict[int, int]:
    """Rank -> pipeline stage, the same in both.

    Raises:
        ConfigError: the layouts differ.
        CheckpointError: a rank's stream is missing.
    """
    for capsule in (first, second):
        capsule.require_streams()
    groups = [capsule.manifest(1)["groups"] for capsule in (first, second)]
    if groups[0] != groups[1] or first.ranks != second.ranks:
        layouts = [capsule.manifest(1)["layout"] for capsule in (first, second)]
        raise ConfigError(
            f"The runs have other layouts ({_shown(layouts[0])} and {_shown(layouts[1])}): their ranks hold other "
            "parts of the model and cannot be compared one to one. mslm replay layout-diff compares other layouts."
        )
    return {rank: group.index(rank) for group in groups[0]["pp"] for rank in group}


def rank_divergence(
    first: Capsule, second: Capsule, rank: int, stage: tuple[int, int]
) -> tuple[Divergence | None, int]:
    """(a rank's first difference, frames that both have); ``stage`` is its pipeline stage and how many there are."""
    found = rank_search(first, second, rank)
    return _divergence(rank, stage, found), found.frames


def rank_search(first: Capsule, second: Capsule, rank: int) -> RankSearch:
    """A rank's first pair of frames that differ."""
    names = first.names(rank), second.names(rank)
    buckets = [capsule.manifest(1, rank)["buckets"] for capsule in (first, second)]
    alike = bool(buckets[0] == buckets[1])
    paths = stream_path(first.folder, rank), stream_path(second.folder, rank)
    return search(
        Streams(paths, names),
        lambda one, other: frame_difference(one, other, names, alike=alike),
        halving=alike,
    )


def _require_common(first: Capsule, second: Capsule, searches: Mapping[int, RankSearch]) -> None:
    """Refuse ranks of which no step could be compared: nothing is known of them."""
    ranks = [rank for rank, one in searches.items() if not one.steps]
    if not ranks:
        return
    own = [f"{capsule.folder} has {steps_text(steps)}" for capsule, steps in _pairs(first, second, searches[ranks[0]])]
    raise ConfigError(
        f"Rank {', '.join(map(str, ranks))}: no recorded step in common, so that nothing was compared there ("
        f"{', '.join(own)} of rank {ranks[0]}). Record the run again, or let it go further."
    )


def _alone(first: Capsule, second: Capsule, searches: Mapping[int, RankSearch]) -> tuple[str, ...]:
    lines: dict[str, list[int]] = {}
    for rank, one in searches.items():
        for capsule, steps in _pairs(first, second, one):
            if steps:
                said = f"{capsule.folder} alone has {steps_text(steps)}, which nothing was compared with"
                lines.setdefault(said, []).append(rank)
    return tuple(
        line + ("" if len(ranks) == len(searches) else f" on rank {', '.join(map(str, ranks))}")
        for line, ranks in lines.items()
    )


def _pairs(first: Capsule, second: Capsule, found: RankSearch) -> Iterator[tuple[Capsule, frozenset[int]]]:
    return zip((first, second), found.alone, strict=True)


def steps_text(steps: Collection[int]) -> str:
    """Steps as they are printed: their number and span."""
    if len(steps) < 2:
        return f"step {min(steps)}" if steps else "no whole step"
    whole = len(steps) == max(steps) - min(steps) + 1
    return f"steps {min(steps)} to {max(steps)}" + ("" if whole else f" ({len(steps)} of them)")


def _divergence(rank: int, stage: tuple[int, int], found: RankSearch) -> Divergence | None:
    if found.difference is None or found.place is None:
        return None
    key, index, only_in = found.difference
    step, start = found.place.key
    return Divergence(step, start, rank, key, index, *stage, only_in, found.previous)


def frame_difference(
    one: Frame, other: Frame, names: tuple[Sequence[str], Sequence[str]], *, alike: bool = True
) -> tuple[Key, int, str | None] | None:
    """(first record that differs, its index, in which run alone it is) of two frames of one step.

    Args:
        alike: both ranks hold the same parts of everything; else what only one of them holds is passed over.
    """
    found = next(differing_records(one, other, names, alike=alike), None)
    return None if found is None else (found.key, found.place, found.only_in)


def differing_records(
    one: Frame, other: Frame, names: tuple[Sequence[str], Sequence[str]], *, alike: bool = True
) -> Iterator[Differing]:
    """Every record that differs between two frames of one step, in the first one's order; then what is not in it."""
    if Flag.ROOTS in one.flags or Flag.ROOTS in other.flags:
        yield from _differing_roots(one, other, names)
        return
    if names[0] == names[1] and np.array_equal(one.records, other.records):
        return
    here, there = _lanes_by_key(one, names[0]), _lanes_by_key(other, names[1])
    # A run that was recorded at a coarser level has nothing of some phases.
    phases = {key.phase for key in here} & {key.phase for key in there}
    whole = phases if alike else phases - DIVIDED
    for index, (key, lanes) in enumerate(here.items()):
        if key in there and there[key] != lanes:
            yield Differing(key, index, lanes, there[key])
        if key not in there and key.phase in whole:
            yield Differing(key, index, lanes, None)
    for index, (key, lanes) in enumerate(there.items()):
        if key not in here and key.phase in whole:
            yield Differing(key, index, None, lanes)


def _differing_roots(one: Frame, other: Frame, names: tuple[Sequence[str], Sequence[str]]) -> Iterator[Differing]:
    here, there = roots(one, names[0]), dict(roots(other, names[1]))
    for index, (phase, lanes) in enumerate(here):
        if phase in there and there[phase] != lanes:
            yield Differing(Key(Phase(phase), 0, WHOLE_PHASE, 0), index, lanes, there[phase])


def _lanes_by_key(frame: Frame, names: Sequence[str]) -> dict[Key, tuple[int, int]]:
    found: dict[Key, tuple[int, int]] = {}
    seen: Counter[tuple[int, int, int]] = Counter()
    for phase, _, micro_batch, name, lanes in frame.records.tolist():
        place = phase, micro_batch, name
        found[Key(Phase(phase), micro_batch, names[name], seen[place])] = tuple(lanes)
        seen[place] += 1
    return found


def _shown(layout: Mapping[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in layout.items())
