"""What each stage after pretraining is worth on the sorting task, with intervals: examples/sorting, trained at TP2.

    python tests/bench/alignment_gains.py [--quick] [--seeds 3] [--work DIR]

Every seed has its own task, tokenizer and models. Before and after are the same 512 questions that no stage has seen.
In full it takes some 30 minutes on two cores; ``--quick`` is one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.sorting.task import write_task  # noqa: E402

RECIPES = ROOT / "examples" / "sorting"
LABELLED = 256
RESAMPLES = 2000
CHANCE = 0.5


@dataclass
class Gain:
    """One claim: per item what was right before and after, over all seeds, and the means of each seed."""

    name: str
    bar: float
    """Of the mean after (accuracy) or of the difference (gain); which of both is ``of_difference``."""
    of_difference: bool
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    by_seed: list[tuple[float, float]] = field(default_factory=list)

    def add(self, before: list[float], after: list[float]) -> None:
        """Take in a seed."""
        self.before += before
        self.after += after
        self.by_seed.append((float(np.mean(before)), float(np.mean(after))))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the paired difference, by bootstrap over the items of all seeds."""
        difference = np.array(self.after) - np.array(self.before)
        random = np.random.default_rng(0)
        means = difference[random.integers(0, len(difference), (RESAMPLES, len(difference)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    @property
    def significant(self) -> bool:
        """The interval excludes 0 and every seed has gained."""
        return self.interval[0] > 0.0 and all(after > before for before, after in self.by_seed)

    @property
    def reached(self) -> bool:
        """The bar is met on average over the seeds."""
        before, after = np.mean(self.by_seed, axis=0)
        return bool((after - before if self.of_difference else after) >= self.bar)

    def row(self) -> str:
        """A line of the table."""
        low, high = self.interval
        seeds = "  ".join(f"{before:.3f} -> {after:.3f}" for before, after in self.by_seed)
        what = "gain" if self.of_difference else "after"
        return f"{self.name:28} {seeds}   [{low:+.3f}, {high:+.3f}]   {what} >= {self.bar}: {self.reached}"


class Pipeline:
    """The stages of one seed, in a directory of their own."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.seed = directory, seed
        directory.mkdir(parents=True)
        write_task(directory / "data" / "sorting" / "task", seed)
        self._compile()

    def train(self, recipe: str, name: str, *overrides: str) -> str:
        """Train a recipe as run ``name``; returns its directory."""
        own = [f"name={name}", f"train.seed={self.seed}", "log.progress_bar=false", "log.tensorboard=false"]
        self._mslm("train", str(RECIPES / f"{recipe}.yaml"), *own, *overrides)
        return f"runs/{name}"

    def answers(self, run: str) -> list[float]:
        """1 for every question of the test set that the run answers rightly, greedily."""
        out = self.directory / f"{Path(run).name}.json"
        file = self.directory / "data" / "sorting" / "task" / "test.jsonl"
        settings = ("--template", "raw", "--max-new-tokens", "12", "--batch-size", "256")
        self._mslm("eval", run, "--task", str(file), *settings, "--out", str(out))
        return [item["values"]["passed"] for item in json.loads(out.read_text())["tasks"][0]["items"]]

    def preferences(self, run: str, key: str) -> list[float]:
        """1 for every held-out pair of which the run's last validation (of its ``key``) prefers the right answer."""
        found = json.loads((self.directory / run / "validation.jsonl").read_text().splitlines()[-1])
        pairs = int(found["loss_tokens"])
        right = round(found[key] * pairs)
        return [1.0] * right + [0.0] * (pairs - right)

    def _compile(self) -> None:
        data = self.directory / "data" / "sorting"
        chats = (data / "task" / "chat.jsonl").read_text().splitlines(keepends=True)
        (data / "task" / "few.jsonl").write_text("".join(chats[:LABELLED]))
        corpus = str(data / "corpus")
        self._mslm(
            "data",
            "prepare",
            str(data / "task" / "text.txt"),
            "--output",
            corpus,
            "--vocab-size",
            "280",
            "--split",
            "0",
        )
        shape = (
            "--template",
            "raw",
            "--seq-length",
            "64",
            "--workers",
            "1",
            "--tokenizer-model",
            f"{corpus}/tokenizer",
        )
        for kind, name in (("chat", "chat"), ("chat", "few"), ("preference", "preference"), ("prompt", "prompt")):
            source = str(data / "task" / f"{name}.jsonl")
            self._mslm("data", "examples", source, "--output", str(data / name), "--kind", kind, *shape)

    def _mslm(self, *arguments: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "megatron_slm.cli", *arguments]
        done = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )


def seed_of(gains: dict[str, Gain], pipeline: Pipeline, say: Any) -> None:
    """Every stage of one seed."""
    base = pipeline.train("sft", "sort-sft")
    before = pipeline.answers(base)
    say(f"sft: {np.mean(before):.3f} of the questions")

    everything = "train.eval_iters=100"
    for name, recipe, key in (
        ("reward model", "reward", "accuracy"),
        ("DPO, preferences", "dpo", "rewards/accuracies"),
    ):
        after = pipeline.preferences(pipeline.train(recipe, f"sort-{recipe}", everything), key)
        gains[name].add([CHANCE] * len(after), after)
        say(f"{name}: {gains[name].by_seed[-1]}")
    gains["DPO, task"].add(before, pipeline.answers("runs/sort-dpo"))
    say(f"DPO, task: {gains['DPO, task'].by_seed[-1]}")

    grpo = pipeline.train("grpo", "sort-grpo")
    gains["GRPO, task"].add(before, pipeline.answers(grpo))
    say(f"grpo: {gains['GRPO, task'].by_seed[-1]}")

    gains["PPO, task"].add(before, pipeline.answers(pipeline.train("ppo", "sort-ppo")))
    say(f"ppo: {gains['PPO, task'].by_seed[-1]}")

    student = (
        "model.hidden_size=48",
        "data.data_path=data/sorting/few",
        "train.train_iters=200",
        "train.micro_batch_size=16",
    )
    labels = pipeline.answers(pipeline.train("sft", "sort-labels", *student))
    own = pipeline.answers(pipeline.train("distill", "sort-distill"))
    gains["distillation, task"].add(labels, own)
    say(f"distill: {gains['distillation, task'].by_seed[-1]}")


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="keep everything here (default: a temporary directory)")
    arguments = parser.parse_args()
    gains = {
        one.name: one
        for one in (
            Gain("reward model", 0.93, of_difference=False),
            Gain("DPO, preferences", 0.95, of_difference=False),
            Gain("DPO, task", 0.0, of_difference=True),
            Gain("GRPO, task", 0.15, of_difference=True),
            Gain("PPO, task", 0.15, of_difference=True),
            Gain("distillation, task", 0.0, of_difference=True),
        )
    }
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(1 if arguments.quick else arguments.seeds):
            directory = (arguments.work or Path(temporary)) / f"seed-{seed}"
            seed_of(gains, Pipeline(directory, seed), lambda text, seed=seed: print(f"seed {seed}: {text}", flush=True))
    for gain in gains.values():
        print(gain.row())
    print(
        json.dumps(
            {
                "benchmark": "alignment_gains",
                "significant_share": sum(gain.significant for gain in gains.values()) / len(gains),
                "reached_share": sum(gain.reached for gain in gains.values()) / len(gains),
                "gains": {name: np.mean(gain.by_seed, axis=0).round(4).tolist() for name, gain in gains.items()},
                "seeds": len(gains["GRPO, task"].by_seed),
            }
        )
    )


if __name__ == "__main__":
    main()
