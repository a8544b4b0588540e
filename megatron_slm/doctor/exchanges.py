"""Collectives of a layout's groups against what the planner expects of their links, or one another. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_slm.doctor.result import Result, State

SUBJECT = "collectives"
SLOW, FAILING = 2.0, 5.0
"""Times the expectation beyond which a group is slow, and beyond which it fails: NCCL on a wrong interface is 10 times
slower and more; the planner's rates are right within tens of percent."""
SLOW_GROUP = 3.0
"""Times the median of the other groups of its axis, where no expectation is known."""


@dataclass(frozen=True)
class Timed:
    """One collective on one group.

    Attributes:
        axis: of the layout, or ``world``.
        collective: as in ``plan.ops.Exchange``.
        ranks: members.
        small_seconds, large_seconds: medians of a small and a large message.
        large_bytes: S of ``plan.links.volume``.
        sent_bytes: what one member sends of it.
        expected_seconds: of the large one, by the planner's link model; None where the links are not known.
    """

    axis: str
    collective: str
    ranks: tuple[int, ...]
    small_seconds: float
    large_seconds: float
    large_bytes: int
    sent_bytes: float
    expected_seconds: float | None = None

    @property
    def gb_per_second(self) -> float:
        """What one member sends in a second: the bus bandwidth of nccl-tests."""
        return self.sent_bytes / self.large_seconds / 1e9


def slow_groups(groups: Sequence[Timed]) -> list[Timed]:
    """Groups that are slow against their expectation, or else against the others of their axis."""
    return [group for group in groups if _factor(group, groups) > _limit(group)]


def results(groups: Sequence[Timed], slow: Sequence[Timed]) -> Iterator[Result]:
    """One line for each axis, and one for each slow group, by its ranks."""
    for axis in dict.fromkeys(group.axis for group in groups):
        own = [group for group in groups if group.axis == axis]
        sound = [group for group in own if group not in slow] or own
        usual = sorted(sound, key=lambda one: one.large_seconds)[len(sound) // 2]
        value = f"{len(own)} group(s) of {len(own[0].ranks)}: {_shown(usual)}"
        if sound is not own:
            yield Result(SUBJECT, f"{axis} {usual.collective}", "ok", value, _expected(usual))
    for group in slow:
        factor = _factor(group, groups)
        members = ", ".join(map(str, group.ranks[:8])) + (" ..." if len(group.ranks) > 8 else "")
        state: State = "fail" if factor > FAILING else "warn"
        remedy = (
            "See the slow node or link above if one is named; else look which way it takes (NCCL_DEBUG=INFO, "
            "NCCL_SOCKET_IFNAME, NCCL_IB_HCA)."
        )
        value = f"ranks {members}: {_shown(group)}, {factor:.1f} times what is expected"
        expected = _expected(group) or f"as the other {group.axis} groups"
        yield Result(SUBJECT, f"{group.axis} {group.collective}", state, value, expected, remedy)


def _factor(group: Timed, groups: Sequence[Timed]) -> float:
    if group.expected_seconds is not None:
        return group.large_seconds / group.expected_seconds
    others = [one.large_seconds for one in groups if one.axis == group.axis and one.ranks != group.ranks]
    return group.large_seconds / statistics.median(others) if others else 1.0


def _limit(group: Timed) -> float:
    return SLOW_GROUP if group.expected_seconds is None else SLOW


def _shown(group: Timed) -> str:
    return (
        f"{1e6 * group.small_seconds:.0f} us, {group.gb_per_second:.3g} GB/s with {group.large_bytes / 2**20:g} MiB "
        f"({1e3 * group.large_seconds:.2f} ms)"
    )


def _expected(group: Timed) -> str:
    if group.expected_seconds is None:
        return ""
    return f"{1e3 * group.expected_seconds:.2f} ms by the planner's links"
