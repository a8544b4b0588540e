"""The covering array: every pair that can stand together is there, the others are listed, and chance plays no part."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from tests import axes as matrix
from tests.covering import Case, Covering, all_pairs, covering, pairs_of

AXES = {"a": ("1", "2", "3"), "b": ("1", "2"), "c": ("1", "2"), "d": ("1", "2", "3", "4"), "e": ("1", "2")}
ENABLING = ("b", "c")


def reasons(case: Case) -> list[str]:
    """b 2 needs c 2; a 3 excludes d 4."""
    chosen = dict(case)
    found = []
    if chosen["b"] == "2" and chosen["c"] == "1":
        found.append("b 2 needs c 2")
    if chosen["a"] == "3" and chosen["d"] == "4":
        found.append("a 3 excludes d 4")
    return found


def possible_cases() -> Iterator[Case]:
    """All of them, by exhaustion."""
    for values in itertools.product(*AXES.values()):
        case = tuple(zip(AXES, values, strict=True))
        if not reasons(case):
            yield case


def test_possible_pairs_are_covered_and_the_others_listed() -> None:
    drawn = covering(AXES, reasons, enabling=ENABLING)
    possible = {pair for case in possible_cases() for pair in pairs_of(case)}
    covered = {pair for case in drawn.cases for pair in pairs_of(case)}
    assert covered == possible
    assert set(drawn.excluded) == set(all_pairs(AXES)) - possible
    assert all(not reasons(case) for case in drawn.cases)
    assert drawn.excluded[frozenset({("b", "2"), ("c", "1")})] == ("b 2 needs c 2",)
    # No fewer than the largest two axes allow, and not much more.
    assert 12 <= len(drawn.cases) <= 16 < sum(1 for _ in possible_cases())


@pytest.fixture(scope="module")
def drawn() -> Covering:
    return covering(matrix.AXES, matrix.reasons, enabling=matrix.ENABLING)


def test_the_matrix_covers_every_pair_that_the_rules_accept(drawn: Covering) -> None:
    covered = {pair for case in drawn.cases for pair in pairs_of(case)}
    assert covered | set(drawn.excluded) == set(all_pairs(matrix.AXES))
    assert not covered & set(drawn.excluded)
    assert all(not matrix.reasons(case) for case in drawn.cases)


def test_what_the_matrix_leaves_out_is_known(drawn: Covering) -> None:
    """A rule that begins or ceases to refuse a combination is seen here."""
    assert {" and ".join(" ".join(part) for part in sorted(pair)) for pair in drawn.excluded} == matrix.EXCLUDED


def test_no_possible_case_holds_an_excluded_pair(drawn: Covering) -> None:
    """The search for a possible case looks near the plain one; cases from anywhere confirm it."""
    chance = random.Random(1)
    looked_at = 0
    for pair in itertools.chain.from_iterable([list(drawn.excluded)] * 20):
        values = {axis: chance.choice(choices) for axis, choices in matrix.AXES.items()} | dict(pair)
        looked_at += 1
        assert matrix.reasons(matrix.case(**values)), f"{values} is possible"
    assert looked_at >= 20


def test_two_draws_are_equal(drawn: Covering) -> None:
    again = covering(matrix.AXES, matrix.reasons, enabling=matrix.ENABLING)
    assert (again.cases, again.excluded) == (drawn.cases, drawn.excluded)
