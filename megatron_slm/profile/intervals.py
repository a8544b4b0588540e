"""Sets of points in time as sorted lists of intervals that do not touch. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]
"""Start and end, the end excluded; nanoseconds."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What at least one of them covers."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            if end > found[-1][1]:
                found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def without(intervals: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """What the first set covers and the second does not; both as :func:`union` gives them."""
    found: list[Interval] = []
    index = 0
    for start, end in intervals:
        while index < len(removed) and removed[index][1] <= start:
            index += 1
        at, here = start, index
        while here < len(removed) and removed[here][0] < end:
            if removed[here][0] > at:
                found.append((at, removed[here][0]))
            at = max(at, removed[here][1])
            here += 1
        if at < end:
            found.append((at, end))
    return found


def common(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What both sets cover; both as :func:`union` gives them."""
    found: list[Interval] = []
    index = 0
    for start, end in intervals:
        while index < len(others) and others[index][1] <= start:
            index += 1
        here = index
        while here < len(others) and others[here][0] < end:
            found.append((max(start, others[here][0]), min(end, others[here][1])))
            here += 1
    return found


def total(intervals: Iterable[Interval]) -> int:
    """Nanoseconds that a set covers."""
    return sum(end - start for start, end in intervals)
