"""Rewards to advantages: what the oracles of test_stage_oracles.py do not cover."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_slm.stages import advantages
from megatron_slm.stages.config import GrpoConfig, PpoConfig

REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.1, 0.1, 0.1, 0.1], [2.0, -1.0, 0.0, 0.0]]


def test_megatron_divides_by_the_deviation_of_the_population() -> None:
    found = advantages.group_advantages(torch.tensor(REWARDS), GrpoConfig(grpo_convention="megatron"))
    for rewards, got in zip(REWARDS, found.advantages.tolist(), strict=True):
        mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
        assert got == pytest.approx([(reward - mean) / (std + 1e-4) for reward in rewards], abs=1e-7)


def test_nemo_rl_compares_with_the_others_alone() -> None:
    found = advantages.group_advantages(torch.tensor(REWARDS), GrpoConfig(grpo_convention="nemo_rl")).advantages
    others = [0.0, 0.25, 0.5]
    expected = (1.0 - statistics.fmean(others)) / (statistics.stdev(others) + 1e-6)
    assert found[0, 0].item() == pytest.approx(expected)
    # Without variance among the others there is nothing to divide by.
    lone = advantages.group_advantages(torch.tensor([[1.0, 0.1, 0.1, 0.1]]), GrpoConfig(grpo_convention="nemo_rl"))
    assert lone.advantages[0, 0].item() == pytest.approx(0.9)


@pytest.mark.parametrize("convention", ["trl", "verl", "megatron", "nemo_rl"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_without_variance_is_reported_and_teaches_nothing(convention: str, scale: str, baseline: str) -> None:
    config = GrpoConfig(grpo_convention=convention, grpo_scale=scale, grpo_baseline=baseline)
    found = advantages.group_advantages(torch.tensor(REWARDS), config)
    assert found.zero_std.tolist() == [False, True, False]
    assert found.advantages[1].tolist() == [0.0] * 4 and found.reward_std[1] == 0.0
    assert found.reward_std[0].item() == pytest.approx(statistics.stdev(REWARDS[0]))
    assert found.advantages[0, 0] > 0.0


@pytest.mark.parametrize("convention", ["trl", "verl", "megatron", "nemo_rl"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_sample_without_a_reward_takes_no_part(convention: str, scale: str) -> None:
    config = GrpoConfig(grpo_convention=convention, grpo_scale=scale)
    with_hole = torch.tensor([[1.0, math.nan, 0.0, 0.25, 0.5], [math.nan, 2.0, -1.0, 0.0, 0.0]])
    without = torch.tensor([[1.0, 0.0, 0.25, 0.5], [2.0, -1.0, 0.0, 0.0]])
    found = advantages.group_advantages(with_hole, config).advantages
    expected = advantages.group_advantages(without, config).advantages
    assert found[0, 1] == found[1, 0] == 0.0
    assert torch.allclose(found[~with_hole.isnan()], expected.flatten())
    nobody = advantages.group_advantages(torch.full((1, 4), math.nan), config)
    assert nobody.zero_std.tolist() == [True] and not nobody.advantages.any()


def test_the_score_falls_on_the_last_sampled_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    zeros = torch.full((2, 3), math.nan).masked_fill(mask, 0.0)
    rewards, distances = advantages.token_rewards(
        torch.tensor([2.0, 3.0]), zeros, zeros, mask, coefficient=0.5, estimator="k1"
    )
    assert rewards.tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]] and not distances.any()


def test_a_token_that_was_not_sampled_takes_no_step() -> None:
    """As a tool's answer in the midst of a sample: value and advantage pass over it."""
    random = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 1, 4, generator=random, dtype=torch.float64)
    whole = advantages.generalised_advantages(rewards, values, torch.ones(1, 4).bool(), gamma=0.9, lambda_=0.8)
    gap = torch.tensor([[True, True, False, True, True]])
    spread = [torch.full((1, 5), 7.0, dtype=torch.float64).masked_scatter(gap, each) for each in (rewards, values)]
    found = advantages.generalised_advantages(*spread, gap, gamma=0.9, lambda_=0.8)
    for mine, expected in zip(found, whole, strict=True):
        assert torch.equal(mine[gap], expected[0]) and mine[0, 2] == 0.0


def test_whitening_by_the_moments_of_all_ranks() -> None:
    random = torch.Generator().manual_seed(4)
    values, mask = torch.randn(6, 5, generator=random) + 3.0, torch.rand(6, 5, generator=random) > 0.4
    parts = [advantages.moments(values[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 6))]
    total = parts[0] + parts[1]
    centred = advantages.whiten(values, mask, total, centred=True)
    kept = advantages.whiten(values, mask, total, centred=False)
    assert centred[mask].mean().item() == pytest.approx(0.0, abs=1e-7)
    assert centred[mask].std().item() == pytest.approx(1.0)
    assert torch.allclose((kept - centred)[mask], values[mask].double().mean(), atol=1e-6)
    assert not centred[~mask].any() and not kept[~mask].any()


def test_the_price_follows_the_distance_by_a_fifth_at_most() -> None:
    fixed, steered = PpoConfig(), PpoConfig(ppo_kl_target=2.0, ppo_kl_horizon=1000)
    assert advantages.steered_coefficient(0.1, 50.0, 500, fixed) == 0.1
    assert advantages.steered_coefficient(0.1, 50.0, 500, steered) == pytest.approx(0.1 * 1.1)
    assert advantages.steered_coefficient(0.1, 1.9, 500, steered) == pytest.approx(0.1 * (1 - 0.05 * 0.5))
