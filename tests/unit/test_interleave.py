"""Every source has within one sample of its share at every prefix, whatever the shares."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_slm.data.interleave import LONGEST_PERIOD, Turns, quantised, reduced, turns


def worst_deviation(table: Turns, parts: list[int], places: int, owed: list[Fraction] | None = None) -> Fraction:
    """Largest distance of a count from share x places, over all sources and prefixes; exact."""
    total, common = sum(parts), np.lcm.reduce([start.denominator for start in owed]) if owed else 1
    shifts = [int(start * common) * total for start in owed] if owed else [0] * len(parts)
    source, prefix = table.sources(0, places), np.arange(1, places + 1, dtype=np.int64)
    worst = 0
    for number, (part, shift) in enumerate(zip(parts, shifts, strict=True)):
        counted = np.cumsum(source == number)
        worst = max(worst, int(np.abs((part * prefix - total * counted) * common + shift).max()))
    return Fraction(worst, total * int(common))


def bound(parts: list[int]) -> Fraction:
    """Tijdeman's, which no algorithm can better for all shares."""
    return 1 - Fraction(1, max(2, 2 * len(parts) - 2))


def random_weights(state: np.random.Generator, sources: int) -> list[Fraction]:
    """From nearly equal to one part in thousands."""
    spread = state.choice([0.1, 1.0, 3.0])
    return [Fraction(round(value, 3)) + Fraction(1, 1000) for value in state.lognormal(0, spread, sources).tolist()]


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 7, 13, 50])
def test_every_prefix_is_within_the_bound(sources: int) -> None:
    state = np.random.default_rng(sources)
    for _ in range(6):
        parts = [max(1, part) for part in quantised(random_weights(state, sources), int(state.integers(60, 2000)))]
        parts = reduced([Fraction(part) for part in parts])
        assert worst_deviation(turns(tuple(parts)), parts, 3 * sum(parts)) <= bound(parts) < 1


@pytest.mark.parametrize(
    "parts", [[1], [1, 1], [1, 65_535], [65_534, 1, 1], [32_768, 16_384, 8192, 4096, 2048, 1024, 512, 512], [1] * 50]
)
def test_extreme_shares_are_within_the_bound(parts: list[int]) -> None:
    assert worst_deviation(turns(tuple(parts)), parts, 2 * sum(parts)) <= bound(parts)


def test_known_turns() -> None:
    """A change here changes every user's order: raise MIXTURE_VERSION with it."""
    assert turns((1, 1)).sources(0, 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert turns((7, 3)).sources(0, 10).tolist() == FROZEN
    assert turns((5, 3, 2)).sources(0, 10).tolist() == FROZEN_THREE


FROZEN = [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
FROZEN_THREE = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("parts", [(3, 2), (7, 2, 1), (5, 5, 4, 1)])
def test_what_is_owed_at_the_start_is_made_up_for(parts: tuple[int, ...]) -> None:
    """A start anywhere inside a sequence of other shares; together the deviation stays within the bound."""
    others = turns(tuple(range(2, 2 + len(parts))))
    total = sum(range(2, 2 + len(parts)))
    for places in range(1, total):
        had = others.counts(places).tolist()
        owed = [Fraction((2 + number) * places, total) - had[number] for number in range(len(parts))]
        table = turns(parts, tuple(owed))
        assert worst_deviation(table, list(parts), 4 * sum(parts), owed) <= bound(list(parts)), places


def test_stopping_and_going_on_with_the_same_shares_changes_nothing() -> None:
    parts = (7, 4, 3, 1)
    whole = turns(parts)
    for stop in range(20):
        owed = [Fraction(part * stop, 15) - int(had) for part, had in zip(parts, whole.counts(stop), strict=True)]
        assert turns(parts, tuple(owed)).sources(0, 40).tolist() == whole.sources(stop, stop + 40).tolist()


def test_a_start_that_owes_more_than_there_are_places_still_gives_every_place_away() -> None:
    for owed in itertools.product((Fraction(-3, 2), Fraction(0), Fraction(5, 4)), repeat=3):
        table = turns((3, 2, 1), owed)
        assert table.counts(600).tolist() == pytest.approx([300, 200, 100], abs=4)


def test_a_part_of_a_period_is_the_beginning_of_the_whole() -> None:
    parts, owed = (50, 31, 19), (Fraction(1, 2), Fraction(-1, 2), Fraction(0))
    whole = turns(parts, owed)
    for places in (0, 1, 60, 99, 100, 101, 250):
        part = turns(parts, owed, places=places)
        assert part.sources(0, places).tolist() == whole.sources(0, places).tolist()
        assert part.counts(places).tolist() == whole.counts(places).tolist()
        assert all(part.counts(at).tolist() == whole.counts(at).tolist() for at in range(places))
        assert len(part.source) == max(1, places) or places >= 100


def test_counts_and_ranks_agree_with_counting() -> None:
    table = turns((5, 3, 1), (Fraction(1, 2), Fraction(-1, 3), Fraction(-1, 6)))
    length = len(table.source)
    drawn = table.sources(0, 3 * length).tolist()
    for offset in range(3 * length):
        assert table.counts(offset).tolist() == [drawn[:offset].count(number) for number in range(3)]
        place, cycle = table.place(offset)
        rank = int(table.rank[place]) + cycle * int(table.per_cycle[table.source[place]])
        assert (table.source[place], rank) == (drawn[offset], drawn[:offset].count(drawn[offset]))


def test_weights_become_exact_integers_where_the_period_allows() -> None:
    assert reduced([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert reduced([Fraction("2e3"), Fraction(500)]) == [4, 1]
    assert reduced([Fraction("0.333333"), Fraction("0.333333"), Fraction("0.333334")]) == [333_333, 333_333, 333_334]
    assert sum(reduced([Fraction("0.3333333"), Fraction("0.6666667")])) == LONGEST_PERIOD


def test_six_decimals_as_typed_hold_over_a_million_samples_and_are_laid_out_at_once() -> None:
    parts = [333_333, 333_333, 333_334]
    start = time.process_time()
    table = turns(tuple(reduced([Fraction(part, 10**6) for part in parts])))
    assert time.process_time() - start < 3
    assert table.counts(10**6).tolist() == parts
    assert worst_deviation(table, parts, 10**6) <= bound(parts)


def test_quantised_parts_are_the_nearest_and_no_source_dies() -> None:
    weights = [Fraction(10**9), Fraction(10**9 - 1), Fraction(1)]
    parts = reduced(weights)
    assert sum(parts) == LONGEST_PERIOD and parts[2] == 1
    assert parts[:2] == [1 << 19, (1 << 19) - 1]
    state = np.random.default_rng(3)
    for _ in range(50):
        weights = [Fraction(value) for value in state.lognormal(0, 3, 7).tolist()]
        parts = quantised(weights, 1000)
        exact = [float(weight / sum(weights) * 1000) for weight in weights]
        assert sum(parts) == 1000 and min(parts) >= 1
        assert all(abs(part - value) < 1 + 7 * value / 1000 for part, value in zip(parts, exact, strict=True))
    assert quantised([Fraction(1), Fraction(0), Fraction(2)], 9) == [3, 0, 6]
