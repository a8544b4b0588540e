"""A job in which no rank moves on: who waits for whom, and who is to blame. Pure functions of what the ranks said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.survival.place import Place, group_name

_SHOWN = 4
"""Exchanges in one sentence."""


@dataclass(frozen=True)
class Standing:
    """What one rank says of itself when it has not moved on for too long.

    Attributes:
        step: the update that it works on.
        doing: the part of the step, such as "forward and backward".
        seconds: since it has begun with that.
        stack: of its training thread, innermost call last.
    """

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    seconds: float
    place: Place
    stack: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Standing:
        """What ``to_dict`` gave."""
        place = {**values["place"], "ranks": tuple(values["place"]["ranks"])}
        return cls(**{**values, "place": Place(**place)})


@dataclass(frozen=True)
class Verdict:
    """Why a job stands still: ``cause`` in one sentence, ``lines`` of who waits for whom."""

    cause: str
    lines: list[str]

    @property
    def text(self) -> str:
        """Everything."""
        return "\n".join([self.cause, *(f"  {line}" for line in self.lines)])


def judge(standings: Sequence[Standing], silent: Mapping[int, str], axes: Mapping[tuple[int, ...], str]) -> Verdict:
    """Say why nobody moves on.

    Args:
        standings: of the ranks that have said where they stand, at least one.
        silent: of every other rank, what is known of its process.
        axes: name of the group of ranks, such as "tp".
    """
    by_rank = {one.rank: one for one in standings}
    lines = [f"rank {rank} says nothing: {known}" for rank, known in sorted(silent.items())]
    lines += [_stands(one, _waited_for(one, by_rank), axes) for one in sorted(standings, key=lambda one: one.rank)]
    longest = max(one.seconds for one in standings)
    step = min(one.step for one in standings)
    return Verdict(f"no rank has moved on for {longest:.0f} s, at step {step}: {_cause(by_rank, silent, axes)}", lines)


def _cause(by_rank: Mapping[int, Standing], silent: Mapping[int, str], axes: Mapping[tuple[int, ...], str]) -> str:
    waiting = [one for one in by_rank.values() if one.place.exchanging]
    blocked = f"; it blocks {_exchanges(waiting, axes)}" if waiting else ""
    if silent:
        return "; ".join(f"rank {rank} says nothing ({known})" for rank, known in sorted(silent.items())) + blocked
    own = [one for one in by_rank.values() if not one.place.exchanging]
    if own:
        named = "; ".join(f"rank {one.rank} is at work of its own in {one.place.line} ({one.doing})" for one in own)
        return named + (blocked if len(own) == 1 else blocked.replace("; it blocks", "; they block"))
    for one in waiting:
        others = {
            by_rank[rank].place.operation
            for rank in one.place.ranks
            if rank in by_rank and by_rank[rank].place.ranks == one.place.ranks
        }
        if len(others) > 1:
            return (
                f"the ranks of {group_name(one.place.ranks, axes)} are in different exchanges "
                f"({', '.join(sorted(others))}), so that none of them can end"
            )
    if len({(one.place.operation, one.place.ranks) for one in waiting}) > 1 and not _matched(by_rank):
        return f"the ranks wait for each other in a circle ({_exchanges(waiting, axes)})"
    return (
        f"every rank is in its exchange ({_exchanges(waiting, axes)}) and nothing arrives: the network between them is "
        "lost (a cut cable, a firewall, the wrong interface)"
    )


def _matched(by_rank: Mapping[int, Standing]) -> bool:
    """Whether some group is complete: all of its ranks are in the same exchange."""
    return any(not _waited_for(one, by_rank) for one in by_rank.values())


def _waited_for(one: Standing, by_rank: Mapping[int, Standing]) -> list[int]:
    """Ranks of its exchange that are not in it."""
    return [
        rank
        for rank in one.place.ranks
        if rank != one.rank and (rank not in by_rank or not _same_exchange(one, by_rank[rank]))
    ]


def _same_exchange(one: Standing, other: Standing) -> bool:
    """Whether two ranks are in one exchange: a collective of one group, or each waits for the other in a pipeline."""
    if one.place.ranks == other.place.ranks:
        return one.place.operation == other.place.operation
    return one.rank in other.place.ranks and other.rank in one.place.ranks


def _stands(one: Standing, waited_for: Sequence[int], axes: Mapping[tuple[int, ...], str]) -> str:
    where = f"{one.host}, process {one.pid}, step {one.step}, {one.doing} for {one.seconds:.0f} s"
    if not one.place.exchanging:
        return f"rank {one.rank} ({where}) is in {one.place.line}, in no exchange"
    text = f"rank {one.rank} ({where}) is in {one.place.operation}"
    text += f" of {group_name(one.place.ranks, axes)}" if one.place.ranks else ""
    text += f", {one.place.line}"
    return text + (f"; it waits for rank {', '.join(map(str, waited_for))}" if waited_for else "")


def _exchanges(waiting: Sequence[Standing], axes: Mapping[tuple[int, ...], str]) -> str:
    found = {
        f"{one.place.operation} of {group_name(one.place.ranks, axes)}": None for one in waiting if one.place.ranks
    }
    found |= {one.place.operation: None for one in waiting if not one.place.ranks}
    shown = list(found)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
