"""The covering array: every pair that can stand together is there, the others are listed, and chance plays no part."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.axes import EXCLUDED, SPACE, case
from tests.covering import Case, Covering, Space, all_pairs, covering, pairs_of

AXES = {"a": ("1", "2", "3"), "b": ("1", "2"), "c": ("1", "2"), "d": ("1", "2", "3", "4"), "e": ("1", "2")}


def reasons(case: Case) -> list[str]:
    """b 2 needs c 2; a 3 excludes d 4."""
    chosen = dict(case)
    found = []
    if chosen["b"] == "2" and chosen["c"] == "1":
        found.append("b 2 needs c 2")
    if chosen["a"] == "3" and chosen["d"] == "4":
        found.append("a 3 excludes d 4")
    return found


SMALL = Space(AXES, enabling=("b", "c"), fits=lambda case: ("e", "1") in case or ("d", "1") in case, reasons=reasons)


def possible_cases() -> Iterator[Case]:
    """All of them, by exhaustion."""
    for values in itertools.product(*AXES.values()):
        case = tuple(zip(AXES, values, strict=True))
        if SMALL.possible(case):
            yield case


def test_possible_pairs_are_covered_and_the_others_listed() -> None:
    drawn = covering(SMALL)
    possible = {pair for case in possible_cases() for pair in pairs_of(case)}
    covered = {pair for case in drawn.cases for pair in pairs_of(case)}
    assert covered == possible
    assert set(drawn.excluded) == set(all_pairs(AXES)) - possible
    assert all(SMALL.possible(case) for case in drawn.cases)
    assert drawn.excluded[frozenset({("b", "2"), ("c", "1")})] == ("b 2 needs c 2",)
    assert drawn.excluded[frozenset({("d", "2"), ("e", "2")})] == ()
    # No fewer than the two largest axes need, and not much more.
    assert 11 <= len(drawn.cases) <= 16 < sum(1 for _ in possible_cases())


@pytest.fixture(scope="module")
def drawn() -> Covering:
    return covering(SPACE)


def test_the_matrix_covers_every_pair_that_the_rules_accept(drawn: Covering) -> None:
    covered = {pair for case in drawn.cases for pair in pairs_of(case)}
    assert covered | set(drawn.excluded) == set(all_pairs(SPACE.axes))
    assert not covered & set(drawn.excluded)
    assert all(SPACE.possible(case) for case in drawn.cases)
    assert len(drawn.cases) <= 70, "the matrix is to run within minutes"


def test_what_the_matrix_leaves_out_is_known(drawn: Covering) -> None:
    """A rule that begins or ceases to refuse a combination is seen here."""
    listed = [pair for pairs in EXCLUDED.values() for pair in pairs]
    assert len(listed) == len(set(listed))
    assert {" with ".join(" ".join(part) for part in sorted(pair)) for pair in drawn.excluded} == set(listed)


def test_no_possible_case_holds_an_excluded_pair(drawn: Covering) -> None:
    """The search for a possible case looks near the plain one; cases from anywhere confirm it."""
    chance = random.Random(1)
    for pair in list(drawn.excluded) * 20:
        values = {axis: chance.choice(choices) for axis, choices in SPACE.axes.items()} | dict(pair)
        assert not SPACE.possible(case(**values)), f"{values} is possible"


def test_two_draws_are_equal(drawn: Covering) -> None:
    again = covering(SPACE)
    assert (again.cases, again.excluded) == (drawn.cases, drawn.excluded)
