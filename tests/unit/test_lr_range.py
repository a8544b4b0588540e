"""The learning-rate range test: its rates, when it ends, and what it reads from a curve whose shape is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_slm.errors import ConfigError
from megatron_slm.train.lr_range import Curve, LearningRateRange, Suggestion, draw, range_record, suggest


def test_rates_rise_by_one_factor_from_low_to_high() -> None:
    span = LearningRateRange.parse("1e-6:1e-1", 101)
    rates = [span.learning_rate(step) for step in range(101)]
    assert (rates[0], rates[-1]) == (pytest.approx(1e-6), pytest.approx(1e-1))
    assert all(
        after / before == pytest.approx(10 ** (5 / 100)) for before, after in zip(rates, rates[1:], strict=False)
    )


@pytest.mark.parametrize("text", ["1e-3", "1:1e-3", "0:1", "-1:1", "a:b", "1e-3:inf", "nan:1", "1:2:3", ""])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="1e-7:1"):
        LearningRateRange.parse(text, 100)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="train.train_iters = 19"):
        LearningRateRange.parse("1e-7:1", 19)


def curve_of(span: LearningRateRange, noise: float = 0.0) -> Curve:
    """Flat at 6, falling around 1e-3 (steepest there) to its lowest at about 1e-2, then exploding."""
    curve = Curve(span.window)
    for step in range(span.steps):
        rate = span.learning_rate(step)
        place = math.log10(rate)
        loss = 6.0 - 3.0 / (1.0 + math.exp(-4.0 * (place + 3.0))) + 50.0 * max(0.0, place + 1.9) ** 2
        if curve.add(rate, loss + noise * (-1) ** step):
            break
    return curve


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_suggestions_are_where_the_curve_says(noise: float) -> None:
    found = suggest(curve_of(LearningRateRange.parse("1e-7:1", 200), noise))
    assert found is not None
    assert found.steepest == pytest.approx(1e-3, rel=0.35)
    assert found.tenth == pytest.approx(10**-1.9 / 10, rel=0.35)


def test_it_stops_where_the_loss_explodes() -> None:
    span = LearningRateRange.parse("1e-7:1", 200)
    curve = curve_of(span)
    assert 0.03 < curve.learning_rates[-1] < 0.3, "before the end of the range, behind the minimum"
    assert curve.smoothed[-1] > 4.0 * min(curve.smoothed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_stops_at_a_loss_that_is_not_finite(bad: float) -> None:
    curve = Curve(3)
    assert not curve.add(1e-3, 5.0)
    assert curve.add(2e-3, bad)
    assert curve.losses == [5.0]


def test_a_loss_that_only_rises_suggests_nothing() -> None:
    curve = Curve(1)
    for step in range(30):
        curve.add(10.0**step, 5.0 + 0.1 * step)
    assert suggest(curve) is None and suggest(Curve(1)) is None


def test_the_suggestion_stays_in_the_range() -> None:
    curve = Curve(1)
    for step in range(30):
        curve.add(1e-3 * (1.0 + step / 30), 5.0 - 0.1 * step)
    assert suggest(curve) == Suggestion(steepest=pytest.approx(1e-3, rel=1.0), tenth=1e-3)


def test_record_and_picture(tmp_path: Path) -> None:
    span = LearningRateRange.parse("1e-7:1", 100)
    curve = curve_of(span)
    found = suggest(curve)
    record = range_record(span, curve, found)
    count = len(curve.losses)
    assert record["steps"] == list(range(1, count + 1)) and len(record["smoothed_losses"]) == count
    assert record["suggestion"]["steepest"] in curve.learning_rates
    draw(curve, found, "a title", tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
