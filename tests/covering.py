"""Pairwise covering arrays: few cases in which every pair of values that can stand together does so in at least one.

A case gives each axis one of its values; the first value of an axis is its plain one. Greedy after Cohen et al. (AETG,
IEEE TSE 23(7), 1997), without chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Case = tuple[tuple[str, str], ...]
"""(axis, value) of every axis, in the order of the axes."""
Pair = frozenset[tuple[str, str]]
"""Two axes with a value each."""


@dataclass(frozen=True)
class Covering:
    """The drawn cases, and the pairs that no case can hold.

    Attributes:
        excluded: pair -> what stands against it where least does; nothing where no case with the pair fits.
    """

    cases: tuple[Case, ...]
    excluded: Mapping[Pair, tuple[str, ...]]


@dataclass(frozen=True)
class Space:
    """What is drawn from.

    Attributes:
        axes: axis -> its values.
        enabling: axes whose other values can make possible what is impossible beside their plain ones.
        fits: whether a case is looked at at all.
        reasons: why a case is impossible; nothing for one that is possible.
    """

    axes: Mapping[str, Sequence[str]]
    enabling: Sequence[str]
    fits: Callable[[Case], bool]
    reasons: Callable[[Case], Sequence[str]]

    def possible(self, case: Case) -> bool:
        """Whether a case can be drawn."""
        return self.fits(case) and not self.reasons(case)


def covering(space: Space) -> Covering:
    """Cases that cover every possible pair; the same ones each time."""
    cases: list[Case] = []
    covered: set[Pair] = set()
    excluded: dict[Pair, tuple[str, ...]] = {}
    for pair in all_pairs(space.axes):
        if pair in covered:
            continue
        case, against = _nearest(pair, space)
        if case is None or against:
            excluded[pair] = against
        else:
            cases.append(_varied(_enriched(case, pair, space, covered), pair, space, covered, len(cases)))
            covered.update(pairs_of(cases[-1]))
    return Covering(tuple(cases), excluded)


def all_pairs(axes: Mapping[str, Sequence[str]]) -> Iterator[Pair]:
    """Every pair of values of two axes."""
    for (one, values), (other, others) in itertools.combinations(axes.items(), 2):
        for value, another in itertools.product(values, others):
            yield frozenset(((one, value), (other, another)))


def pairs_of(case: Case) -> Iterator[Pair]:
    """The pairs that a case covers."""
    yield from map(frozenset, itertools.combinations(case, 2))


def _nearest(pair: Pair, space: Space) -> tuple[Case | None, tuple[str, ...]]:
    """The possible case with ``pair`` that is plain on most axes; else the one with the fewest reasons against it.

    Returns:
        The case, None if none fits, and what stands against it.
    """
    plain: Case = tuple((axis, values[0]) for axis, values in space.axes.items())
    start = _with(plain, pair)
    free = [axis for axis in space.enabling if axis not in dict(pair)]
    best: tuple[Case | None, tuple[str, ...]] = None, ()
    for distance in range(len(free) + 1):
        for changed in itertools.combinations(free, distance):
            for values in itertools.product(*(space.axes[axis][1:] for axis in changed)):
                case = _with(start, zip(changed, values, strict=True))
                if not space.fits(case):
                    continue
                against = tuple(space.reasons(case))
                if not against:
                    return case, ()
                if best[0] is None or len(against) <= len(best[1]):
                    best = case, against
    return best


def _enriched(case: Case, kept: Pair, space: Space, covered: Collection[Pair]) -> Case:
    """The possible case moved, axis by axis, to the possible values that cover most; ``kept`` stays."""
    gain, before = _gain(case, covered), -1
    while gain > before:
        before = gain
        for axis, values in space.axes.items():
            if axis in dict(kept):
                continue
            for candidate in (_with(case, [(axis, value)]) for value in values):
                if _gain(candidate, covered) > gain and space.possible(candidate):
                    case, gain = candidate, _gain(candidate, covered)
    return case


def _varied(case: Case, kept: Pair, space: Space, covered: Collection[Pair], number: int) -> Case:
    """The possible case with other values on the axes that cover nothing new: each case meets others by the way."""
    gain = _gain(case, covered)
    for place, (axis, values) in enumerate(space.axes.items()):
        candidate = _with(case, [(axis, values[(number + place) % len(values)])])
        if axis not in dict(kept) and _gain(candidate, covered) >= gain and space.possible(candidate):
            case = candidate
    return case


def _gain(case: Case, covered: Collection[Pair]) -> int:
    return sum(pair not in covered for pair in pairs_of(case))


def _with(case: Case, values: Iterable[tuple[str, str]]) -> Case:
    changed = dict(values)
    return tuple((axis, changed.get(axis, value)) for axis, value in case)
