"""In which turn the sources of a mixture come, so that no source is ever a sample ahead of its share or behind it.

With the shares ``parts[k] / D``, D the sum of the integers ``parts``, the turns repeat after D places. Which source has
which place is the chairman assignment problem: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32
(1980), whose algorithm keeps every source within ``1 - 1 / (2m - 2)`` of its share at every prefix, m the number of
sources. The j-th turn (from 0) of a source may come once its share has grown to ``j + c`` and must have come before it
passes ``j + 1 - c``, with ``c = 1 / (2m - 2)``; of the turns that may come, the one that must come first is taken. All
arithmetic is in integers.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, gcd, lcm

import numpy as np

from megatron_slm.config.mixture_text import FINEST_PARTS

LONGEST_PERIOD = FINEST_PARTS
"""Places of a period. Shares that need more are quantised to this many parts."""


@dataclass(frozen=True)
class Turns:
    """Whose turn it is at every place from 0 on: a table whose last part repeats for ever.

    Attributes:
        source: int32 [places of the table], which of the ``parts`` has the turn.
        rank: int32 [places of the table], how many turns the same source had before, from place 0 on.
        head: places before the part that repeats.
        per_cycle: int64 [sources], turns of each in that part.
        places: for each source, the places of the table where it has the turn, ascending.
    """

    source: np.ndarray
    rank: np.ndarray
    head: int
    per_cycle: np.ndarray
    places: tuple[np.ndarray, ...]

    def place(self, offset: int) -> tuple[int, int]:
        """Where the table holds the turn at ``offset``, and how often its end has been passed before."""
        if offset < self.head:
            return offset, 0
        cycle, place = divmod(offset - self.head, len(self.source) - self.head)
        return self.head + place, cycle

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The source of every turn from ``start`` to ``stop``, int32 [stop - start]."""
        places = np.arange(start, stop, dtype=np.int64)
        places = np.where(places < self.head, places, (places - self.head) % (len(self.source) - self.head) + self.head)
        return np.asarray(self.source[places])

    def counts(self, offset: int) -> np.ndarray:
        """Turns of every source before ``offset``, int64 [sources]."""
        place, cycle = self.place(offset)
        before = np.array([np.searchsorted(places, place) for places in self.places], dtype=np.int64)
        return np.asarray(before + cycle * self.per_cycle)


@functools.lru_cache(maxsize=1024)
def turns(
    parts: tuple[int, ...],
    owed: tuple[Fraction, ...] | None = None,
    sharers: int = 0,
    *,
    places: int | None = None,
) -> Turns:
    """The turns of ``parts``, positive integers without a common divisor; equal claims are met in their order.

    Args:
        owed: for each source, by how many samples it is behind its share at the start; default 0. Then the first
            periods differ from those that repeat.
        sharers: the m of the bound, if larger than the number of parts: the sources that what is owed comes from.
        places: as many are asked for, if not any number; fewer than a period are laid out in less time.
    """
    assert min(parts) > 0, f"a source without a share has no turn: {parts}"
    state = owed or (Fraction(0),) * len(parts)
    seen: dict[tuple[Fraction, ...], int] = {}
    periods: list[np.ndarray] = []
    sharers, total = max(sharers, len(parts)), sum(parts)
    if places is not None and places < total:
        periods.append(_period(parts, state, sharers, max(1, places)))
        seen[state] = 0
    while state not in seen:
        seen[state] = len(periods)
        periods.append(_period(parts, state, sharers, total))
        had = np.bincount(periods[-1], minlength=len(parts)).tolist()
        state = tuple(before + part - count for before, part, count in zip(state, parts, had, strict=True))
    table = np.concatenate(periods)
    head = seen[state] * total
    by_source = _places(table, len(parts))
    ranks = np.empty(len(table), dtype=np.int32)
    for own in by_source:
        ranks[own] = np.arange(len(own), dtype=np.int32)
    return Turns(table, ranks, head, np.bincount(table[head:], minlength=len(parts)), by_source)


def _period(parts: tuple[int, ...], owed: tuple[Fraction, ...], sharers: int, places: int) -> np.ndarray:
    """The first ``places`` turns of a period, int32 [places], beginning where each source is ``owed`` so much."""
    releases, keys = _claims(parts, owed, Fraction(1, 2 * max(1, sharers - 1)))
    ready: list[int] = []
    taken: list[int] = []
    following, upcoming = 0, len(keys)
    for place in range(1, places + 1):
        # A source that has lost its share may leave its place to none: then the next turn comes early.
        while following < upcoming and (releases[following] <= place or not ready):
            heapq.heappush(ready, keys[following])
            following += 1
        taken.append(heapq.heappop(ready))
    return np.asarray(np.array(taken, dtype=np.int64) % len(parts), dtype=np.int32)


def _claims(parts: tuple[int, ...], owed: tuple[Fraction, ...], slack: Fraction) -> tuple[list[int], list[int]]:
    """Every turn of a period by the place where it may come: that place, and ``deadline * sources + source``.

    Places count from 1: release = ceil((j + c - behind) D / part), deadline = floor((j + 1 - c - behind) D / part).
    """
    total, released, keys = sum(parts), [], []
    for source, (part, behind) in enumerate(zip(parts, owed, strict=True)):
        # Rounding the constant before the division changes neither and leaves integers of 64 bits.
        first, last = ceil((slack - behind) * total), floor((1 - slack - behind) * total)
        # Turns beyond the share make up for what is owed.
        grown = np.arange(part + 2 + max(0, ceil(behind)), dtype=np.int64) * total
        released.append(-(-(grown + first) // part))
        keys.append((grown + last) // part * len(parts) + source)
    release, key = np.concatenate(released), np.concatenate(keys)
    order = np.lexsort((key, release))
    return release[order].tolist(), key[order].tolist()


def _places(source: np.ndarray, num_sources: int) -> tuple[np.ndarray, ...]:
    """For each source, the places that hold it, int32, ascending."""
    by_source = np.argsort(source, kind="stable").astype(np.int32)
    return tuple(np.split(by_source, np.cumsum(np.bincount(source, minlength=num_sources))[:-1]))


def reduced(weights: list[Fraction]) -> list[int]:
    """Integers in the ratio of ``weights``, exact where their sum is at most ``LONGEST_PERIOD``.

    Otherwise the shares are rounded to that many parts by largest remainder; a positive weight keeps at least one part.
    """
    common = lcm(*(weight.denominator for weight in weights))
    parts = [int(weight * common) for weight in weights]
    divisor = gcd(*parts)
    parts = [part // divisor for part in parts]
    if sum(parts) <= LONGEST_PERIOD:
        return parts
    return reduced([Fraction(part) for part in quantised(weights, LONGEST_PERIOD)])


def quantised(weights: list[Fraction], total: int) -> list[int]:
    """Integers of sum ``total`` nearest to the ratio of ``weights``; each positive weight gets at least 1."""
    whole = sum(weights)
    alive = [index for index, weight in enumerate(weights) if weight > 0]
    free = total - len(alive)
    # One part each first; the rest in proportion to what each still lacks, so that no source dies.
    wanted = [max(Fraction(0), weight / whole * total - (weight > 0)) for weight in weights]
    scale = Fraction(free) / (sum(wanted) or 1)
    exact = [value * scale for value in wanted]
    parts = [int(value) + (weight > 0) for value, weight in zip(exact, weights, strict=True)]
    by_remainder = sorted(alive, key=lambda index: (int(exact[index]) - exact[index], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
