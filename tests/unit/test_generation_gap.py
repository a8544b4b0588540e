"""The gap between the log-probabilities of generation and of training: what is measured, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_slm.errors import RolloutError
from megatron_slm.rollout.config import GapLimits, RolloutConfig
from megatron_slm.rollout.gap import Gap, joined, measure, require

SEGMENTS = torch.tensor([[-1, 0, 0, -1, 1, 1], [2, 2, 2, 2, -1, -1]])
SAMPLES = (10, 11, 12)


def measured(differences: dict[tuple[int, int], float]) -> Gap:
    generated = torch.where(SEGMENTS >= 0, -1.5, math.nan)  # what belongs to no completion has no effect
    trained = generated.clone()
    for place, difference in differences.items():
        trained[place] += difference
    return measure(trained, generated, SEGMENTS, SAMPLES)


def test_no_difference() -> None:
    gap = measured({})
    assert (gap.tokens, gap.mean, gap.largest, gap.sequence_ratio) == (8, 0.0, 0.0, 1.0)
    require(gap, GapLimits(1e-12, 1e-12))


def test_means_extremes_and_the_worst_sequences() -> None:
    gap = measured({(0, 1): 0.25, (0, 2): 0.25, (1, 0): -0.5, (1, 1): 0.375})
    assert gap.mean == pytest.approx(1.375 / 8) and gap.largest == 0.5
    assert gap.sequence_ratio == pytest.approx(math.exp(0.5)), "of a sequence, not of a token"
    assert [one.sample for one in gap.worst] == [12, 10, 11]
    assert gap.metrics == {
        "rollout/logp_diff_mean": gap.mean,
        "rollout/logp_diff_max": 0.5,
        "rollout/seq_ratio_max": gap.sequence_ratio,
    }


def test_parts_join_to_the_whole() -> None:
    differences = {(0, 1): 0.25, (0, 2): 0.25, (1, 0): -0.5, (1, 1): 0.375}
    whole = measured(differences)
    generated = torch.where(SEGMENTS >= 0, -1.5, 0.0)
    trained = generated.clone()
    for place, difference in differences.items():
        trained[place] += difference
    upper = measure(trained[:1], generated[:1], SEGMENTS[:1], SAMPLES[:2])
    lower = measure(trained[1:], generated[1:], SEGMENTS[1:] - 2 * (SEGMENTS[1:] > 0), SAMPLES[2:])
    assert joined([upper, lower]) == whole
    assert joined([]).largest == 0.0 and joined([]).sequence_ratio == 1.0


def test_a_gap_above_the_limit_is_refused_with_value_limit_and_sample() -> None:
    gap = measured({(1, 2): 0.02})
    require(gap, GapLimits(0.021, 1.0))
    with pytest.raises(RolloutError, match=r"sample 12 differs by 0\.02 nats.*max_logprob_gap=0\.019"):
        require(gap, GapLimits(0.019, 1.0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(wrong: float) -> None:
    for gap in (measured({(0, 4): wrong}), joined([measured({}), measured({(0, 4): wrong})])):
        with pytest.raises(RolloutError, match="sample 11 differs"):
            require(gap, GapLimits(1e6, 1e6))


def test_the_limit_follows_the_number_format() -> None:
    exact, rounded = (RolloutConfig().gap_limits(bf16=bf16) for bf16 in (False, True))
    assert exact.largest < rounded.largest and exact.mean < rounded.mean
    assert RolloutConfig(max_logprob_gap=0.3).gap_limits(bf16=False) == GapLimits(0.3, exact.mean)
    assert RolloutConfig(max_mean_logprob_gap=0.3).gap_limits(bf16=False) == GapLimits(exact.largest, 0.3)


def test_a_small_gap_of_every_token_is_refused_by_the_mean() -> None:
    gap = measured({(0, 4): 0.002, (1, 2): 0.002})
    require(gap, GapLimits(0.01, gap.mean))
    with pytest.raises(RolloutError, match=r"on average.*max_mean_logprob_gap=0\.0001 \(largest 0\.002, of sample 1"):
        require(gap, GapLimits(0.01, 1e-4))
