"""``mslm diagnose`` on policies that really learn from their own answers: tables of logits, sound ones and sick ones.

A simulation in the place of whole runs of ``ppo`` and ``grpo``, to be replaced by their records: the policy is a table
[prompts, answers] of logits, trained as GRPO would (groups, their mean as baseline, gradient of log p), and the names
are those that the stages log. Every disease comes from its cause: a rate, a proxy, a bait, a price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.diagnose.policy_rules import kl_known
from megatron_slm.diagnose.records import Records
from megatron_slm.diagnose.rules import diagnose

PROMPTS, ANSWERS, GROUP, STEPS = 32, 24, 16, 120
WATCHED = {"rollout": {"watched": ["exact"]}}

Table = Any
"""float64 [PROMPTS, ANSWERS]."""


def softmax(logits: Table) -> Table:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def right_answers() -> Table:
    """1.0 where an answer is right: one of each prompt."""
    truth = np.zeros((PROMPTS, ANSWERS))
    truth[np.arange(PROMPTS), np.arange(PROMPTS) % 8] = 1.0
    return truth


def learned(
    seed: int,
    proxy: Table,
    *,
    rate: float = 1.0,
    price: float = 0.0,
    lengths: Table | None = None,
    start: Table | None = None,
    stage: str = "grpo",
) -> list[dict[str, Any]]:
    """Records of a policy that learns from ``proxy`` [PROMPTS, ANSWERS].

    Args:
        price: of the distance from the policy it starts from, k1 in the reward.
        lengths: tokens of an answer [ANSWERS].
        start: its first logits.
    """
    random = np.random.default_rng(seed)
    truth = right_answers()
    lengths = np.full(ANSWERS, 6.0) if lengths is None else lengths
    logits = random.normal(scale=0.3, size=(PROMPTS, ANSWERS)) if start is None else start.copy()
    reference = np.log(softmax(logits))
    records = []
    for step in range(1, STEPS + 1):
        now = softmax(logits)
        drawn = np.stack([random.choice(ANSWERS, GROUP, p=row) for row in now])
        rows = np.arange(PROMPTS)[:, None]
        rewards, distance = proxy[rows, drawn], np.log(now[rows, drawn]) - reference[rows, drawn]
        priced = rewards - price * distance
        spread = priced.std(axis=1, keepdims=True)
        advantages = (priced - priced.mean(axis=1, keepdims=True)) / (spread + 1e-4)
        gradient = np.zeros_like(logits)
        np.add.at(gradient, (np.broadcast_to(rows, drawn.shape), drawn), advantages / GROUP)
        gradient -= now * advantages.sum(axis=1, keepdims=True) / GROUP
        logits = logits + rate * gradient
        entropy = float(-(now * np.log(now + 1e-30)).sum(axis=1).mean() / lengths.mean())
        records.append(
            {
                "step": step,
                "loss": 0.0,
                "reward": float(rewards.mean()),
                "rewards/exact/mean": float(truth[rows, drawn].mean()),
                "frac_reward_zero_std": float((rewards.std(axis=1) < 1e-9).mean()),
                "completions/mean_length": float(lengths[drawn].mean()),
                "completions/clipped_ratio": float((lengths[drawn] >= 40.0).mean()),
                "completions/unscored_ratio": 0.0,
                "rollout/logp_diff_max": 2e-7,
                "rollout/logp_diff_mean": 3e-8,
                "policy/entropy" if stage == "ppo" else "entropy": entropy,
                "objective/kl": float(distance.mean()),
            }
        )
    return records


def found(steps: Sequence[Mapping[str, Any]], stage: str = "grpo", **sections: Any) -> dict[str, Any]:
    """Findings by name."""
    records = Records(Path("run"), {"stage": stage, **WATCHED, **sections}, steps)
    return {finding.name: finding for finding in diagnose(records).findings}


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
@pytest.mark.parametrize("seed", range(5))
def test_sound_policies_have_nothing(seed: int, stage: str) -> None:
    steps = learned(seed, right_answers(), rate=0.2, price=0.02, stage=stage)
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.3, "it learns"
    assert not found(steps, stage)


def with_format(credit: float) -> Table:
    """Right answers count 1; half of the others have the format, which counts a little."""
    proxy = right_answers()
    proxy[:, 12:] = credit
    return proxy


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_too_high_takes_the_format_credit_and_collapses(seed: int) -> None:
    unlikely = np.random.default_rng(seed).normal(scale=0.3, size=(PROMPTS, ANSWERS))
    unlikely[right_answers() > 0.0] -= 6.0
    steps = learned(seed, with_format(0.15), rate=10.0, start=unlikely)
    names = found(steps)
    assert {"entropy-collapse", "zero-variance-groups"} <= set(names)
    assert names["zero-variance-groups"].step < 20 and "collapsed" in names["zero-variance-groups"].causes[0]
    assert max(step["reward"] for step in steps) < 0.35, "the right answers were never found"


@pytest.mark.parametrize("seed", range(3))
def test_a_bait_is_reward_hacking(seed: int) -> None:
    """The reward model gives more for an answer it has never seen than for any it knows."""
    proxy = np.full((PROMPTS, ANSWERS), 0.3)
    proxy[:, 20] = 0.95
    names = found(learned(seed, proxy, rate=0.2))
    assert "reward-hacking" in names and "exact" in names["reward-hacking"].summary


def test_a_policy_that_goes_on_leaving_its_reference_is_named() -> None:
    """The better an answer, the less likely it was at first: every step goes further."""
    proxy = np.tile(np.linspace(0.0, 1.0, ANSWERS), (PROMPTS, 1))
    free = found(learned(0, proxy, rate=0.8, start=-5.0 * proxy), "ppo")
    assert "kl-blow-up" in free
    priced = found(learned(0, proxy, rate=0.8, start=-5.0 * proxy, price=0.3), "ppo")
    assert "kl-blow-up" not in priced


@pytest.mark.parametrize(
    ("stage", "price", "said"),
    [
        ("ppo", {"ppo_kl_coef": 0.05}, "needs 20 steps with objective/kl"),
        ("ppo", {"ppo_kl_coef": 0.0}, "needs a reference: ppo.ppo_kl_coef above 0"),
        ("grpo", {"grpo_kl_beta": 0.1}, "needs 20 steps with kl and completions/mean_length"),
        ("grpo", {"grpo_kl_beta": 0.0}, "needs a reference: grpo.grpo_kl_beta above 0"),
    ],
)
def test_a_short_run_with_a_reference_is_not_told_to_have_one(stage: str, price: dict[str, float], said: str) -> None:
    assert kl_known(Records(Path("run"), {"stage": stage, stage: price}, [{"step": 1, "loss": 0.0}])) == said


def test_length_that_pays_is_a_bias() -> None:
    lengths = np.concatenate([np.full(12, 6.0), np.linspace(8.0, 48.0, 12)])
    proxy = np.broadcast_to(lengths / 50.0, (PROMPTS, ANSWERS)) + 0.3 * right_answers()
    names = found(learned(0, proxy, rate=0.15, lengths=lengths))
    assert "length-bias" in names and any("cut off" in line for line in names["length-bias"].evidence)
    sound = found(learned(0, right_answers(), rate=0.2, lengths=np.full(ANSWERS, 6.0)))
    assert "length-bias" not in sound


def test_all_right_answers_are_the_likeliest_cause_of_equal_groups() -> None:
    steps = learned(0, right_answers(), rate=3.0)
    names = found(steps)
    assert set(names) == {"zero-variance-groups"} and "too easy" in names["zero-variance-groups"].causes[0]


def test_a_gap_between_generation_and_training_is_named() -> None:
    steps = learned(0, right_answers(), rate=0.2)
    for step in steps[60:]:
        step["rollout/logp_diff_max"] = 8e-3
    assert found(steps)["generation-gap"].step == 61
    assert not found(steps, precision={"bf16": True}), "bf16 rounds that much"


def test_answers_without_a_score_are_named() -> None:
    steps = learned(0, right_answers(), rate=0.2)
    for step in steps[::2]:
        step["completions/unscored_ratio"] = 0.25
    assert set(found(steps)) == {"unscored-answers"}
    for step in steps[1:]:
        step["completions/unscored_ratio"] = 0.0
    assert not found(steps)


def preferred(features: Sequence[float], *, sft_weight: float, seed: int = 0) -> list[dict[str, Any]]:
    """DPO (beta 0.1) on answers [N] with one feature each, logits = weight x feature; chosen 0, rejected 1.

    Only the difference of the two is rewarded: what else the feature makes likely, nobody asks.
    """
    random = np.random.default_rng(seed)
    x, weight, beta = np.asarray(features), 0.0, 0.1
    base = np.log(softmax(np.zeros((1, len(features)))))[0]
    records = []
    for step in range(1, 101):
        logprobs = np.log(softmax(weight * x[None, :]))[0]
        delta = logprobs - base
        margin = beta * (delta[0] - delta[1])
        mean = float((np.exp(logprobs) * x).sum())
        push = beta * (x[0] - x[1]) / (1.0 + np.exp(margin))
        weight += 1.5 * (push + sft_weight * (x[0] - mean)) + 0.002 * random.normal()
        noisy = delta + 0.02 * random.normal(size=len(features))
        records.append(
            {
                "step": step,
                "loss": float(np.log1p(np.exp(-margin))),
                "logps/chosen_delta": float(noisy[0]),
                "logps/chosen": float(logprobs[0]),
                "logps/rejected": float(logprobs[1]),
                "rewards/accuracies": float(np.clip(0.5 + margin + 0.01 * random.normal(), 0.0, 1.0)),
            }
        )
    return records


def test_likelihood_displacement_is_named_and_mended_by_the_sft_term() -> None:
    features = [1.0, 0.5, 3.0, 3.0, 2.5, 0.0]
    names = found(preferred(features, sft_weight=0.0), "dpo")
    assert (
        set(names) == {"likelihood-displacement"} and "dpo_sft_weight 0" in names["likelihood-displacement"].causes[1]
    )
    assert "likelihood-displacement" not in found(preferred(features, sft_weight=0.5), "dpo")


def test_pairs_whose_chosen_side_gains_are_sound() -> None:
    assert not found(preferred([3.0, 0.5, 1.0, 1.0, 0.0, 0.5], sft_weight=0.0), "dpo")


def validations(old: Sequence[float], new: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"step": 20 * at, "loss": a + b, "loss_by_source": {"replay": a, "chat": b}}
        for at, (a, b) in enumerate(zip(old, new, strict=True))
    ]


def test_forgetting_is_a_slice_that_rises_while_another_falls() -> None:
    steps = [{"step": at + 1, "loss": 3.0 * 0.98**at} for at in range(80)]

    def names(held: Sequence[Mapping[str, Any]], against: Records | None = None) -> set[str]:
        records = Records(Path("run"), {"stage": "sft"}, steps, held, against=against)
        return {finding.name for finding in diagnose(records).findings}

    assert names(validations([2.5, 2.6, 2.8, 3.0], [3.0, 2.0, 1.5, 1.2])) == {"forgetting"}
    assert not names(validations([2.5, 2.49, 2.51, 2.5], [3.0, 2.0, 1.5, 1.2]))
    assert not names(validations([2.5, 2.4, 2.3, 2.2], [3.0, 2.0, 1.5, 1.2]))
    parent = Records(Path("parent"), {"stage": "sft"}, steps, validations([2.9, 2.2], [4.0, 4.0]))
    assert names(validations([2.5, 2.4, 2.3, 2.3], [3.0, 2.0, 1.5, 1.2]), parent) == {"forgetting"}
