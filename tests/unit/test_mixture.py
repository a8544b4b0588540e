"""A mixture reads each source in its own order, in the configured shares, and finds any position at once."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from megatron_slm.data.mixture import MixtureOrder, Phase, SampleId, Source, described
from megatron_slm.data.order import SampleOrder

SIZES = {"books": 40, "code": 7, "web": 1000}


def source(name: str, num_samples: int | None = None) -> Source:
    return Source(name, SampleOrder(num_samples or SIZES[name], 1, f"digest of {name}", 16))


def phase(start: int, **weights: str) -> Phase:
    return Phase.of(start, {name: Fraction(weight) for name, weight in weights.items()})


def mixture(*phases: Phase) -> MixtureOrder:
    return MixtureOrder(tuple(map(source, SIZES)), phases)


ONE_PHASE = mixture(phase(0, books="0.5", code="0.2", web="0.3"))
PHASES = mixture(
    phase(0, books="0.5", code="0.5"),
    phase(33, books="0.2", code="0.3", web="0.5"),
    phase(34, books="1", web="2"),
    phase(400, web="0.75", books="0.25"),
)
BOTH = pytest.mark.parametrize("order", [ONE_PHASE, PHASES], ids=["one phase", "phases"])


@BOTH
def test_scalar_and_vector_agree(order: MixtureOrder) -> None:
    for start, stop in ((0, 500), (30, 36), (399, 401), (7, 7), (10**9, 10**9 + 40)):
        numbers, epochs, indices = order.sample_ids(start, stop)
        names = [order.sources[number].name for number in numbers.tolist()]
        vector = [SampleId(*one) for one in zip(names, epochs.tolist(), indices.tolist(), strict=True)]
        assert [order.sample_id(position) for position in range(start, stop)] == vector


@BOTH
def test_each_source_is_read_in_its_own_order_and_passed_epoch_after_epoch(order: MixtureOrder) -> None:
    read: dict[str, list[tuple[int, int]]] = {name: [] for name in SIZES}
    for position in range(600):
        found = order.sample_id(position)
        assert order.counts(position).tolist() == [len(read[name]) for name in SIZES]
        read[found.source].append((found.epoch, found.index))
    for one in order.sources:
        alone = [one.order.sample_id(local) for local in range(len(read[one.name]))]
        assert read[one.name] == alone
    assert len({epoch for epoch, _ in read["code"]}) > 2 and {epoch for epoch, _ in read["web"]} == {0}


def worst_share_error(order: MixtureOrder, samples: int) -> float:
    """Over all prefixes and sources, phases added up."""
    numbers, _, _ = order.sample_ids(0, samples)
    worst = 0.0
    ends = [*(one.start for one in order.phases[1:]), samples]
    for number, one in enumerate(order.sources):
        target = [
            np.full(stop - held.start, float(held.shares.get(one.name, 0)))
            for held, stop in zip(order.phases, ends, strict=True)
        ]
        worst = max(worst, float(np.abs(np.cumsum(np.concatenate(target)) - np.cumsum(numbers == number)).max()))
    return worst


@pytest.mark.parametrize("sources", [2, 3, 5, 12, 50])
def test_shares_hold_within_one_sample_at_every_prefix_and_over_changes(sources: int) -> None:
    state = np.random.default_rng(sources)
    names = [f"s{number}" for number in range(sources)]
    for _ in range(8):
        phases, start = [], 0
        weights = state.lognormal(4, 1, sources)
        for _ in range(5):
            phases.append(Phase.of(start, {name: Fraction(int(weights[at]) + 1) for at, name in enumerate(names)}))
            start += int(state.integers(1, 400))
            weights *= state.uniform(0.5, 2, sources)
        order = MixtureOrder(tuple(source(name, 100) for name in names), tuple(phases))
        assert worst_share_error(order, start + 500) < 1


def test_a_source_may_join_later_and_is_then_held_to_its_share() -> None:
    order = mixture(phase(0, books="1"), phase(101, books="0.6", web="0.4"))
    assert set(order.sample_ids(0, 101)[0].tolist()) == {0}
    assert worst_share_error(order, 1000) < 1
    assert order.counts(1101).tolist() == [701, 0, 400]


def test_a_source_whose_share_ends_is_not_read_any_more() -> None:
    later = PHASES.sample_ids(34, 5000)[0]
    assert 1 not in later.tolist()
    shares = np.bincount(later[366:], minlength=3) / len(later[366:])
    assert shares == pytest.approx([0.25, 0, 0.75], abs=0.001)


def test_a_phase_that_changes_no_share_changes_no_sample() -> None:
    again = mixture(*ONE_PHASE.phases, dataclasses.replace(ONE_PHASE.phases[0], start=123))
    for ours, theirs in zip(ONE_PHASE.sample_ids(0, 900), again.sample_ids(0, 900), strict=True):
        assert (ours == theirs).all()


def test_what_comes_before_a_phase_does_not_depend_on_it() -> None:
    for ours, theirs in zip(PHASES.sample_ids(0, 400), mixture(*PHASES.phases[:3]).sample_ids(0, 400), strict=True):
        assert (ours == theirs).all()


def test_neither_listing_nor_names_decide_what_comes() -> None:
    expected = [ONE_PHASE.sample_id(position) for position in range(300)]
    for listed in permutations(ONE_PHASE.sources):
        order = MixtureOrder(listed, ONE_PHASE.phases)
        assert [order.sample_id(position) for position in range(300)] == expected
    renamed = MixtureOrder(
        tuple(dataclasses.replace(one, name=f"z{one.name[::-1]}") for one in ONE_PHASE.sources),
        (Phase(0, tuple((f"z{name[::-1]}", part) for name, part in ONE_PHASE.phases[0].parts)),),
    )
    assert [(f"z{one.source[::-1]}", one.index) for one in expected] == [
        (found.source, found.index) for found in map(renamed.sample_id, range(300))
    ]


def test_one_corpus_is_a_mixture_of_one() -> None:
    alone = SampleOrder(40, 1, "d", 16)
    order = MixtureOrder.of_one("books", alone)
    for position in (0, 39, 40, 10**12):
        assert order.sample_id(position) == SampleId("books", *alone.sample_id(position))


def test_a_lookup_costs_the_same_anywhere() -> None:
    """Far out, a lookup that walked or stored anything would not end."""
    start = time.perf_counter()
    found = Counter(PHASES.sample_id(10**12 + offset).source for offset in range(2000))
    assert time.perf_counter() - start < 5
    assert found["web"] == pytest.approx(1500, abs=1) and found["books"] == pytest.approx(500, abs=1)


def test_shares_are_exactly_what_was_typed_or_what_is_shown() -> None:
    assert phase(0, books="0.1", code="0.2", web="0.7").shares["books"] == Fraction(1, 10)
    odd = phase(5, books="1", web="2")
    assert (odd.entry, odd.shares_text) == ("5: books=1 web=2", "books 0.3333, web 0.6667")
    assert phase(5, books="7", web="3").entry == "5: books=0.7 web=0.3"
    fine = phase(0, books="0.123456789", web="0.876543211")
    assert (1 << 20) % fine.shares["books"].denominator == 0 and fine.rounded and not odd.rounded
    weights = dict(part.split("=") for part in fine.weights_text.split())
    assert Phase.of(0, {name: Fraction(text) for name, text in weights.items()}) == fine


def test_the_log_says_which_shares_are_not_those_that_were_typed() -> None:
    six = phase(0, books="0.333333", code="0.333333", web="0.333334")
    lines = described(mixture(six, phase(9, books="0.1234567", web="0.8765433")))
    assert lines[1] == "shares from sample 0 on: books 0.3333, code 0.3333, web 0.3333"
    assert lines[2].endswith("need finer shares than 1/1,048,576, so these are rounded to multiples of that")


def test_an_adaptive_phase_stands_until_the_next_configured_one() -> None:
    def adaptive(start: int, weights: Mapping[str, Fraction]) -> Phase:
        return Phase.of(start, weights, adaptive=True)

    order = PHASES.with_phase(adaptive(100, {"books": Fraction(1)})).with_phase(adaptive(200, {"web": Fraction(1)}))
    assert [one.start for one in order.phases] == [0, 33, 34, 100, 200, 400]
    assert set(order.sample_ids(100, 200)[0].tolist()) == {0} and set(order.sample_ids(200, 400)[0].tolist()) == {2}
    assert order.configured_at(250) == PHASES.phases[2] and order.configured_at(400) == PHASES.phases[3]
    assert order.phase_at(450) == PHASES.phases[3]
    twice = order.with_phase(adaptive(200, {"books": Fraction(1)}))
    assert len(twice.phases) == len(order.phases) and twice.phase_at(200).parts == (("books", 1),)
    at_a_configured_one = order.with_phase(adaptive(400, {"code": Fraction(1)}))
    assert at_a_configured_one.sample_id(400).source == "code"
