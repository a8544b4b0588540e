"""What each stage after pretraining is worth on the sorting task, with intervals, and three ways to spoil a model.

    python tests/bench/alignment_gains.py [--quick] [--seeds 3] [--work DIR]

examples/sorting, trained at TP2. Every seed has its own task, tokenizer and models; before and after are the same 512
questions that no stage has seen. The controls are runs that must go wrong, and that `mslm diagnose` must name. In full
it takes some 40 minutes on two cores; ``--quick`` is one seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.sorting.pipeline import LABELLED, Pipeline  # noqa: E402
from megatron_slm.evaluate.statistics import Difference, paired_bootstrap  # noqa: E402

CHANCE = 0.5
PROXY_UP, TRUTH_FLAT = 0.1, 0.05
"""A reward model is exploited where its number rises by so much (standard deviations of its pairs) and the truth by
less than this."""


@dataclass
class Paired:
    """One comparison over the seeds: per item what was right before and after."""

    name: str
    before: list[NDArray[np.float64]] = field(default_factory=list)
    after: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
        """Take in a seed; returns a sentence about it."""
        self.before.append(before)
        self.after.append(after)
        return f"{self.name}: {before.mean():.3f} -> {after.mean():.3f}"

    @property
    def pooled(self) -> Difference:
        """Over the items of all seeds."""
        return paired_bootstrap(np.concatenate(self.before), np.concatenate(self.after))

    @property
    def signs(self) -> list[float]:
        """Of each seed, the gain."""
        return [float(after.mean() - before.mean()) for before, after in zip(self.before, self.after, strict=True)]

    def row(self) -> str:
        """A line of the table."""
        seeds = "  ".join(
            f"{before.mean():.3f} -> {after.mean():.3f}" for before, after in zip(self.before, self.after, strict=True)
        )
        return (
            f"{self.name:26} {seeds}   {self.pooled.difference:+.3f} [{self.pooled.low:+.3f}, {self.pooled.high:+.3f}]"
        )


@dataclass
class Gain(Paired):
    """A claim: ``bar`` is what must be reached on average, afterwards or (``of_difference``) as a difference."""

    bar: float = 0.0
    of_difference: bool = True

    @property
    def significant(self) -> bool:
        """The interval excludes 0 and every seed has gained."""
        return self.pooled.low > 0.0 and min(self.signs) > 0.0

    @property
    def reached(self) -> bool:
        """The bar is met on average over the seeds."""
        return (self.pooled.difference if self.of_difference else self.pooled.second) >= self.bar


@dataclass
class Control:
    """A run that must go wrong: whether it did, by seed, and what `mslm diagnose` found."""

    name: str
    expected: frozenset[str]
    reproduced: list[bool] = field(default_factory=list)
    findings: list[list[str]] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    def add(self, reproduced: bool, findings: list[str], evidence: str) -> str:
        """Take in a seed; returns a sentence about it."""
        self.reproduced.append(reproduced)
        self.findings.append(findings)
        self.evidence.append(evidence)
        return f"{self.name}: {evidence}; diagnose: {', '.join(findings) or 'nothing'}"

    @property
    def named(self) -> bool:
        """Every seed has one of the expected findings."""
        return all(self.expected & set(found) for found in self.findings)

    def row(self) -> str:
        """A line of the table."""
        return f"{self.name:26} {'  '.join(self.evidence)}   named: {self.findings}"


@dataclass
class Bench:
    """All claims, and what was not to be lost."""

    gains: dict[str, Gain]
    kept: Paired
    healthy: list[str]
    controls: dict[str, Control]


def bench() -> Bench:
    """What is claimed."""
    gains = (
        Gain("reward model", bar=0.93, of_difference=False),
        Gain("DPO, preferences", bar=0.95, of_difference=False),
        Gain("GRPO, task", bar=0.15),
        Gain("PPO, task", bar=0.15),
        Gain("distillation, task"),
    )
    controls = (
        Control("DPO alone", frozenset({"likelihood-displacement"})),
        Control("GRPO at rate 1e-3", frozenset({"entropy-collapse", "zero-variance-groups", "divergence"})),
        Control("PPO on a weak reward model", frozenset({"reward-hacking"})),
    )
    return Bench({gain.name: gain for gain in gains}, Paired("DPO, task"), [], {one.name: one for one in controls})


def gains_of(found: Bench, pipeline: Pipeline, say: Callable[[str], None]) -> NDArray[np.float64]:
    """Every stage of one seed; returns what the SFT model answers rightly."""
    base = pipeline.train("sft", "sort-sft")
    before = pipeline.answers(base)
    pipeline.mistakes(base)
    preferred = pipeline.preferences(base)
    say(f"sft: {before.mean():.3f} of the questions")

    ranked = pipeline.ranked(pipeline.train("reward", "sort-reward", "train.eval_iters=100"))
    say(found.gains["reward model"].add(np.full(len(ranked), CHANCE), ranked))
    dpo = pipeline.train("dpo", "sort-dpo")
    say(found.gains["DPO, preferences"].add(preferred, pipeline.preferences(dpo)))
    say(found.kept.add(before, pipeline.answers(dpo)))
    for name, recipe in (("GRPO, task", "grpo"), ("PPO, task", "ppo")):
        say(found.gains[name].add(before, pipeline.answers(pipeline.train(recipe, f"sort-{recipe}"))))
    say(f"ppo: KL of a sequence {mean(pipeline.metric('runs/sort-ppo', 'objective/kl')[-20:]):.2f} nats")

    pipeline.train("sft", "sort-teacher", "train.train_iters=600")
    student = ("model.hidden_size=48", "data.data_path=data/sorting/few")
    pipeline.train("sft", "sort-labels", *student, "train.train_iters=200")
    labels = pipeline.train("sft", "sort-labels-longer", *student, "train.train_iters=400")
    own = pipeline.answers(pipeline.train("distill", "sort-distill"))
    say(found.gains["distillation, task"].add(pipeline.answers(labels), own))
    begun = ("model.hidden_size=48", "checkpoint.pretrained_checkpoint=runs/sort-labels", "optimizer.lr=1e-3")
    every = pipeline.answers(pipeline.train("sft", "sort-every-label", *begun, "train.train_iters=200"))
    teacher = pipeline.answers("runs/sort-teacher")
    say(f"the teacher: {teacher.mean():.3f}; the student with every label: {every.mean():.3f}")

    for run in ("sort-dpo", "sort-grpo", "sort-ppo"):
        found.healthy += pipeline.findings(f"runs/{run}")
    say(f"diagnose on the sound runs: {found.healthy or 'nothing'}")
    return before


def controls_of(
    controls: dict[str, Control], pipeline: Pipeline, before: NDArray[np.float64], say: Callable[[str], None]
) -> None:
    """The three runs of one seed that must go wrong."""
    alone = pipeline.train("dpo", "dpo-alone", "dpo.dpo_sft_weight=0")
    fallen, found = pipeline.answers(alone), pipeline.findings(alone)
    chosen = pipeline.metric(alone, "logps/chosen_delta")[-20:]
    evidence = f"task {before.mean():.3f} -> {fallen.mean():.3f}, chosen answers {mean(chosen):+.2f} nats"
    say(controls["DPO alone"].add(fallen.mean() < before.mean() and mean(chosen) < 0.0, found, evidence))

    credit = "rollout.rewards=[exact_match=1, regex=0.2]"
    fast = pipeline.train("grpo", "grpo-fast", "optimizer.lr=1e-3", credit)
    fallen, found = pipeline.answers(fast), pipeline.findings(fast)
    evidence = f"task {before.mean():.3f} -> {fallen.mean():.3f}"
    say(controls["GRPO at rate 1e-3"].add(fallen.mean() < before.mean(), found, evidence))

    weak = ("rollout.rewards=[]", "rollout.reward_model=runs/sort-reward", "rollout.watched=[exact_match]")
    hacked = pipeline.train("ppo", "ppo-weak", *weak, "ppo.ppo_kl_coef=0.02", "optimizer.lr=5e-4")
    found = pipeline.findings(hacked)
    series = (pipeline.metric(hacked, name) for name in ("reward", "rewards/exact_match/mean"))
    proxy, truth = ((mean(values[:5]), mean(values[-20:])) for values in series)
    happened = proxy[1] - proxy[0] > PROXY_UP and truth[1] - truth[0] < TRUTH_FLAT
    evidence = f"reward {proxy[0]:.2f} -> {proxy[1]:.2f}, truth {truth[0]:.3f} -> {truth[1]:.3f}"
    say(controls["PPO on a weak reward model"].add(happened, found, evidence))


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="keep everything here (default: a temporary directory)")
    arguments = parser.parse_args()
    found = bench()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(1 if arguments.quick else arguments.seeds):

            def say(text: str, seed: int = seed) -> None:
                print(f"[{time.monotonic() - started:5.0f} s] seed {seed}: {text}", flush=True)

            pipeline = Pipeline((arguments.work or Path(temporary)) / f"seed-{seed}", seed)
            pipeline.compile()
            before = gains_of(found, pipeline, say)
            controls_of(found.controls, pipeline, before, say)
    for one in (*found.gains.values(), found.kept, *found.controls.values()):
        print(one.row())
    print(json.dumps(summary(found)))


def summary(found: Bench) -> dict[str, Any]:
    """The line of JSON."""
    gains = found.gains.values()
    return {
        "benchmark": "alignment_gains",
        "significant_share": sum(gain.significant for gain in gains) / len(gains),
        "reached": {gain.name: gain.reached for gain in gains},
        "gains": {gain.name: [round(gain.pooled.first, 4), round(gain.pooled.second, 4)] for gain in gains},
        "dpo_task_low": round(found.kept.pooled.low, 4),
        "dpo_task": [round(found.kept.pooled.first, 4), round(found.kept.pooled.second, 4)],
        "controls_reproduced": {name: all(one.reproduced) for name, one in found.controls.items()},
        "controls_named": {name: one.named for name, one in found.controls.items()},
        "found_in_sound_runs": found.healthy,
        "labelled": LABELLED,
        "seeds": len(found.kept.before),
    }


if __name__ == "__main__":
    main()
