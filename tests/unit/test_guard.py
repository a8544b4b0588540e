"""The guard: what it calls a spike, what it does about it, and that a resumed one judges alike."""

from __future__ import annotations

import json
import math
import random

import pytest

from megatron_slm.train.config import TrainConfig
from megatron_slm.train.guard import Guard


def watched(config: TrainConfig, steps: int = 100, seed: int = 0) -> Guard:
    """A guard after ``steps`` ordinary steps: a loss that falls with noise, a norm that varies by a factor."""
    guard, draw = Guard(config), random.Random(seed)
    for step in range(steps):
        loss, norm = 4.0 - 0.005 * step + draw.gauss(0.0, 0.05), math.exp(draw.gauss(0.0, 0.3))
        assert guard.judge(loss, norm, suspected=False).kind == "good", f"a false alarm at step {step}"
        guard.accept(loss, norm)
    return guard


@pytest.mark.parametrize("seed", range(10))
def test_ordinary_noise_is_no_spike(seed: int) -> None:
    guard = watched(TrainConfig(), steps=500, seed=seed)
    assert guard.judge(1.5, 1.0, suspected=False).kind == "good", "the 501st, where the loss has come to"


@pytest.mark.parametrize(("loss", "norm", "named"), [(6.0, 1.0, "loss"), (3.6, 50.0, "gradient norm")])
def test_a_jump_of_loss_or_norm_is_a_spike(loss: float, norm: float, named: str) -> None:
    verdict = watched(TrainConfig(spike_policy="skip")).judge(loss, norm, suspected=False)
    assert (verdict.kind, verdict.policy, verdict.applies) == ("spike", "skip", False)
    assert named in verdict.reason and "median" in verdict.reason


def test_a_sharp_fall_is_no_spike() -> None:
    assert watched(TrainConfig()).judge(0.5, 0.01, suspected=False).kind == "good"


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = watched(TrainConfig(spike_window=64), steps=63)
    assert guard.judge(1000.0, 1000.0, suspected=False).kind == "good"


def test_off_is_off_but_not_for_what_is_not_finite() -> None:
    guard = watched(TrainConfig(spike_policy="off", non_finite_policy="skip"))
    assert guard.judge(1000.0, 1000.0, suspected=False).kind == "good"
    for loss, suspected in ((math.nan, False), (math.inf, False), (3.0, True)):
        verdict = guard.judge(loss, 1.0, suspected=suspected)
        assert (verdict.kind, verdict.policy) == ("non-finite", "skip")


def test_a_batch_in_which_nothing_counts_is_skipped_and_never_learned_from() -> None:
    guard = watched(TrainConfig(spike_policy="off"))
    verdict = guard.judge(math.nan, 0.0, suspected=True, empty=True)
    assert (verdict.kind, verdict.policy, verdict.applies) == ("empty", "skip", False)
    assert "no answer has a score" in verdict.reason


def test_one_rank_with_a_bad_norm_is_enough() -> None:
    guard = Guard(TrainConfig())
    assert guard.suspects(math.nan) and guard.suspects(math.inf) and not guard.suspects(3.0)


def test_a_constant_loss_is_judged_by_its_size() -> None:
    guard = Guard(TrainConfig())
    for _ in range(64):
        guard.accept(2.0, 1.0)
    assert guard.judge(2.0001, 1.0, suspected=False).kind == "good"
    assert guard.judge(2.5, 1.0, suspected=False).kind == "spike"


def test_a_guard_from_its_record_judges_alike() -> None:
    config = TrainConfig()
    guard = watched(config)
    guard.interventions = 3
    again = Guard(config, json.loads(json.dumps(guard.record())))
    assert again.record() == guard.record() and again.interventions == 3
    for loss in (3.5, 3.8, 4.1, 5.0):
        assert again.judge(loss, 1.0, suspected=False) == guard.judge(loss, 1.0, suspected=False)


def test_interventions_are_bounded() -> None:
    guard = Guard(TrainConfig(max_interventions=1))
    assert not guard.exhausted()
    guard.interventions += 1
    assert guard.exhausted() and Guard(TrainConfig(max_interventions=0)).exhausted()
