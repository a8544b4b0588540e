"""Which place is wrong, from where a step was made several times and from where its results part. No torch.

A slot is where a process runs: a machine, and a place on it with its cores or its GPU. Logical ranks keep their data,
state and groups when they are moved to other slots, so that a sound job gives the same bits there.

One explanation says: slot s computed wrongly in some of the makings. In each of them that has struck another logical
rank, whichever ran there. An explanation holds where it agrees with every pair of makings:

    the pair is equal      neither was struck, or both at the same rank
    the pair differs       everything that it differs in began at a struck rank

Struck once alone is transient, struck again and again is persistent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import ORDER, Divergence, pipeline_ranks, rank_divergence
from megatron_slm.replay.stream import Phase

Origins = tuple[frozenset[int], ...]
"""Where a difference began: of each set one rank or several, and nothing tells which. Empty where nothing differs."""


class Slot(NamedTuple):
    """A place for one process."""

    host: str
    number: int

    def __str__(self) -> str:
        return f"slot {self.number} of {self.host}"


Placement = tuple[Slot, ...]
"""The slot of every logical rank."""


class Parting(NamedTuple):
    """Where two makings of a step part; ``divergence`` is the first one of the first origin."""

    divergence: Divergence | None
    origins: Origins


class Explanation(NamedTuple):
    """``slot`` computed wrongly in the makings ``struck``, given by their numbers."""

    slot: Slot
    struck: tuple[int, ...]

    @property
    def persistent(self) -> bool:
        """Whether it was not just once."""
        return len(self.struck) > 1


@dataclass(frozen=True)
class Making:
    """One way in which a step came about.

    Attributes:
        name: in words.
        placement: where its ranks ran.
    """

    name: str
    placement: Placement


def placement(capsule: Capsule, step: int) -> Placement:
    """Where the ranks ran that made ``step``; a recording that does not say it was made by rank r on slot r."""
    manifests = [capsule.manifest(step, rank) for rank in capsule.ranks]
    return tuple(Slot(own["host"], own.get("slot", rank)) for rank, own in zip(capsule.ranks, manifests, strict=True))


def parting(first: Capsule, second: Capsule, restored: Divergence | None = None) -> Parting:
    """Where two recordings of the same steps part.

    A rank whose own difference came later than that of a rank it works with has only received it. Ranks work together
    within a replica of the model up to the reduction of gradients, and all of them from there on.

    Args:
        restored: the difference of the states that the steps began with, where there is one.
    """
    if restored is not None:
        return Parting(restored, (frozenset({restored.rank}),))
    stages = pipeline_ranks(first, second)
    count = max(stages.values()) + 1
    found = {
        rank: divergence
        for rank in first.ranks
        if (divergence := rank_divergence(first, second, rank, (stages[rank], count))[0]) is not None
    }
    if not found:
        return Parting(None, ())
    earliest = min((one.step, one.start) for one in found.values())
    found = {rank: one for rank, one in found.items() if (one.step, one.start) == earliest}
    origins = began(found, replicas(first))
    begun = [found[rank] for group in origins for rank in group]
    return Parting(min(begun, key=Divergence.order), origins)


def began(found: Mapping[int, Divergence], replicas: Sequence[frozenset[int]]) -> Origins:
    """The ranks among those that differ in one step whose difference is no consequence of another's."""
    alone = {rank: one for rank, one in found.items() if ORDER[one.key.phase] < ORDER[Phase.GRADIENT]}
    if not alone:  # ranks keep other parts of what is reduced, so that the order within a phase says nothing
        first = min(ORDER[one.key.phase] for one in found.values())
        return (frozenset(rank for rank, one in found.items() if ORDER[one.key.phase] == first),)
    origins = []
    for replica in replicas:
        times = {rank: one.order()[:-1] for rank, one in alone.items() if rank in replica}
        if times:
            origins.append(frozenset(rank for rank, time in times.items() if time == min(times.values())))
    return tuple(sorted(origins, key=min))


def replicas(capsule: Capsule) -> list[frozenset[int]]:
    """Ranks that exchange anything before gradients are reduced. Experts that are shared out make one of all."""
    manifest = capsule.manifest(1)
    shared = manifest["config"].get("parallel", {}).get("expert_model_parallel_size", 1) > 1
    return joined(capsule.ranks, manifest["groups"], all_of_them=shared)


def joined(
    ranks: Iterable[int], groups: Mapping[str, Sequence[Sequence[int]]], *, all_of_them: bool
) -> list[frozenset[int]]:
    """The same by the groups of each axis; experts that are shared out make one set ``all_of_them``."""
    found = [frozenset({rank}) for rank in ranks]
    if all_of_them:
        return [frozenset().union(*found)]
    for axis in ("tp", "cp", "pp"):
        for group in map(frozenset, groups.get(axis, ())):
            whole = group.union(*(one for one in found if one & group))
            found = [*(one for one in found if not one & group), whole]
    return found


def explanations(placements: Sequence[Placement], pairs: Mapping[tuple[int, int], Origins]) -> list[Explanation]:
    """All that hold; none where no single slot explains what differs.

    Args:
        placements: of every making.
        pairs: (number of a making, of a later one) -> where they part.
    """
    return [one for one in _imaginable(placements) if _holds(one, placements, pairs)]


def _imaginable(placements: Sequence[Placement]) -> Iterator[Explanation]:
    for slot in sorted({slot for placement in placements for slot in placement}):
        there = [number for number, placement in enumerate(placements) if slot in placement]
        for size in range(1, len(there) + 1):
            yield from (Explanation(slot, struck) for struck in combinations(there, size))


def _holds(one: Explanation, placements: Sequence[Placement], pairs: Mapping[tuple[int, int], Origins]) -> bool:
    ranks = {number: placements[number].index(one.slot) for number in one.struck}
    for (first, second), origins in pairs.items():
        struck = {ranks[number] for number in (first, second) if number in ranks}
        if origins and not all(group & struck for group in origins):
            return False
        if not origins and ranks.get(first) != ranks.get(second):
            return False
    return True
