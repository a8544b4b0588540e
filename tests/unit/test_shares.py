"""Shares from sizes, from weights, from held-out losses."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from megatron_slm.data.config import DataConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.shares import after_validation, by_temperature, configured_phases, reweighted

TOKENS = {"kjv": 1_000_000, "code": 8_000_000, "web": 64_000_000}
THIRDS = {"kjv": Fraction(1, 2), "code": Fraction(3, 10), "web": Fraction(1, 5)}


def test_temperature_moves_from_sizes_towards_equal() -> None:
    assert by_temperature({"a": 1, "b": 3}, 1.0) == {"a": Fraction(1, 4), "b": Fraction(3, 4)}
    cubed = by_temperature(TOKENS, 3.0)
    expected = {"kjv": 1 / 7, "code": 2 / 7, "web": 4 / 7}
    assert {name: float(share) for name, share in cubed.items()} == pytest.approx(expected, abs=1e-4)
    assert sum(cubed.values()) == 1
    assert by_temperature({"one": 17}, 2.0) == {"one": 1}
    flat = by_temperature(TOKENS, 1e6)
    assert all(abs(float(share) - 1 / 3) < 1e-4 for share in flat.values())


def test_one_corpus_needs_no_weights() -> None:
    (phase,) = configured_phases(DataConfig(data_path="kjv"), {"kjv": 100})
    assert (phase.start, phase.parts) == (0, (("kjv", 1),))


def test_weights_and_phases_become_shares() -> None:
    config = DataConfig(
        sources=("kjv=a", "code=b"), weights=("kjv=7", "code=3"), phases=("100: kjv=1 code=1", "200: code=1")
    )
    phases = configured_phases(config, {"kjv": 5, "code": 9})
    assert [(one.start, one.parts) for one in phases] == [
        (0, (("code", 3), ("kjv", 7))), (100, (("code", 1), ("kjv", 1))), (200, (("code", 1),)),
    ]  # fmt: skip


def test_replay_takes_its_part_of_every_phase_from_all_alike() -> None:
    config = DataConfig(
        sources=("kjv=a", "code=b"),
        weights=("kjv=0.5", "code=0.5"),
        phases=("100: kjv=3 code=1",),
        replay_run="runs/old",
        replay_share=0.1,
    )
    first, second = configured_phases(config, {"kjv": 5, "code": 9})
    assert first.shares == {"kjv": Fraction(9, 20), "code": Fraction(9, 20), "replay": Fraction(1, 10)}
    assert second.shares == {"kjv": Fraction(27, 40), "code": Fraction(9, 40), "replay": Fraction(1, 10)}
    alone = configured_phases(DataConfig(data_path="kjv", replay_run="r"), {"kjv": 5})
    assert alone[0].shares == {"kjv": Fraction(19, 20), "replay": Fraction(1, 20)}


def test_losses_move_shares_towards_what_is_hard() -> None:
    losses = {"kjv": 2.0, "code": 3.0, "web": 2.5}
    found = reweighted(THIRDS, losses, 0.5)
    raw = {name: float(weight) * math.exp(0.5 * losses[name]) for name, weight in THIRDS.items()}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert {name: float(share) for name, share in found.items()} == pytest.approx(expected, abs=1e-3)
    assert sum(found.values()) == 1 and all(share.denominator <= 1000 for share in found.values())


def test_equal_losses_and_no_strength_change_nothing() -> None:
    assert reweighted(THIRDS, dict.fromkeys(THIRDS, 4.0), 3.0) == THIRDS
    assert reweighted(THIRDS, {"kjv": 1.0, "code": 9.0, "web": 2.0}, 0.0) == THIRDS


@pytest.mark.parametrize("strength", [1.0, 100.0, 1e6])
def test_no_source_dies_however_strong(strength: float) -> None:
    found = reweighted(THIRDS, {"kjv": 1.0, "code": 9.0, "web": 2.0}, strength)
    assert min(found.values()) >= Fraction(1, 1000) and sum(found.values()) == 1
    assert max(found, key=lambda name: found[name]) == "code"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(loss: float) -> None:
    assert reweighted(THIRDS, {"kjv": loss, "code": 9.0, "web": 2.0}, 1.0) == THIRDS


def test_a_source_without_a_loss_keeps_its_share() -> None:
    found = reweighted({**THIRDS, "replay": Fraction(1, 4)}, {"kjv": 1.0, "code": 3.0, "web": 2.0}, 1.0)
    assert float(found["replay"]) == pytest.approx(0.2, abs=0.001)
    assert reweighted({"kjv": Fraction(1, 2), "replay": Fraction(1, 2)}, {"kjv": 1.0}, 1.0)["kjv"] == Fraction(1, 2)


def test_a_validation_starts_from_the_configured_shares() -> None:
    sources = tuple(Source(name, SampleOrder(100, 1, name, 8)) for name in ("code", "kjv"))
    phases = configured_phases(DataConfig(sources=("kjv=a", "code=b"), weights=("kjv=1", "code=1")), {})
    cursor = Cursor.start(MixtureOrder(sources, phases), "hash").advance(40)
    losses = {"kjv": 2.0, "code": 3.0}
    once = after_validation(cursor, losses, 1.0)
    assert once.order.phase_at(40).adaptive and once.order.phase_at(39) == phases[0]
    assert float(once.order.phase_at(40).shares["code"]) == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-3)
    again = after_validation(once.advance(40), losses, 1.0)
    assert again.order.phase_at(80).shares == once.order.phase_at(40).shares
    eased = after_validation(again.advance(40), {"kjv": 3.0, "code": 3.0}, 1.0)
    assert eased.order.phase_at(120).shares == phases[0].shares
