"""The stages of examples/sorting as a program runs them: in a directory of its own, with a task of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.sorting.mistakes import write_mistakes
from examples.sorting.task import write_task

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "sorting"
LABELLED = 256
"""Of the chats, for a student that has few labels."""
SHAPE = (
    *("--tokenizer-model", "data/sorting/corpus/tokenizer"),
    *("--template", "raw", "--seq-length", "64", "--workers", "1"),
)
ANSWERS = ("--template", "raw", "--max-new-tokens", "12", "--batch-size", "256")


class Pipeline:
    """One seed: its task, tokenizer, examples and runs.

    Attributes:
        directory: where the commands run.
        tell: is told every command, as a user would type it.
    """

    def __init__(self, directory: Path, seed: int, tell: Callable[[str], Any] = lambda text: None) -> None:
        """Begin with nothing."""
        self.directory, self.seed, self.tell = directory, seed, tell
        directory.mkdir(parents=True, exist_ok=True)

    def compile(self) -> None:
        """Write the task, and make a tokenizer and examples of it."""
        data = self.directory / "data" / "sorting"
        write_task(data / "task", self.seed)
        chats = (data / "task" / "chat.jsonl").read_text().splitlines(keepends=True)
        (data / "task" / "few.jsonl").write_text("".join(chats[:LABELLED]))
        text = ("data/sorting/task/text.txt", "--output", "data/sorting/corpus")
        self._mslm("data", "prepare", *text, "--vocab-size", "280", "--split", "0")
        for kind, name in (("chat", "chat"), ("chat", "few"), ("preference", "preference"), ("prompt", "prompt")):
            self._examples(kind, name)

    def train(self, recipe: str, name: str, *overrides: str) -> str:
        """Train a recipe as run ``name``; returns its directory."""
        own = [f"name={name}", f"train.seed={self.seed}", "log.progress_bar=false", "log.tensorboard=false"]
        self._mslm("train", str((RECIPES / f"{recipe}.yaml").relative_to(ROOT)), *own, *overrides)
        return f"runs/{name}"

    def answers(self, run: str) -> NDArray[np.float64]:
        """1 for every question of the test set that the run answers rightly, greedily: [512]."""
        return self._evaluated(run, "test", "passed", *ANSWERS)

    def mistakes(self, run: str) -> None:
        """Make pairs of what the run answers wrongly when it draws: to learn from, and to be judged by (test set)."""
        for task, name, choices in (("asked", "mistakes", False), ("test", "choices", True)):
            self._evaluated(run, task, "passed", *ANSWERS, "--temperature", "1", name="drawn")
            data = self.directory / "data" / "sorting" / "task"
            result = self.directory / f"{Path(run).name}-{task}-drawn.json"
            write_mistakes(result, data / f"{task}.jsonl", data / f"{name}.jsonl", choices=choices)
        self._examples("preference", "mistakes")

    def preferences(self, run: str) -> NDArray[np.float64]:
        """1 for every pair of the test set of which the run finds the right answer likelier: [pairs]."""
        return self._evaluated(run, "choices", "right_raw", "--template", "raw")

    def ranked(self, run: str) -> NDArray[np.float64]:
        """1 for every held-out pair of which a reward model's last validation puts the right answer first."""
        found = json.loads((self.directory / run / "validation.jsonl").read_text().splitlines()[-1])
        pairs = int(found["loss_tokens"])
        right = round(found["accuracy"] * pairs)
        return np.repeat([1.0, 0.0], [right, pairs - right])

    def findings(self, run: str, *arguments: str) -> list[str]:
        """Names of what ``mslm diagnose`` finds."""
        found = self._mslm("diagnose", run, "--json", *arguments, codes=(0, 1))
        return [finding["name"] for finding in json.loads(found)["findings"]]

    def metric(self, run: str, name: str) -> list[float]:
        """A number of the run's records, of the steps that have it."""
        rows = [json.loads(line) for line in (self.directory / run / "metrics.jsonl").read_text().splitlines()]
        return [row[name] for row in rows if row.get(name) is not None]

    def _examples(self, kind: str, name: str) -> None:
        source, output = f"data/sorting/task/{name}.jsonl", f"data/sorting/{name}"
        self._mslm("data", "examples", source, "--output", output, "--kind", kind, *SHAPE)

    def _evaluated(self, run: str, task: str, value: str, *arguments: str, name: str = "") -> NDArray[np.float64]:
        out = "-".join(part for part in (Path(run).name, task, name) if part) + ".json"
        self._mslm("eval", run, "--task", f"data/sorting/task/{task}.jsonl", *arguments, "--out", out)
        items = json.loads((self.directory / out).read_text())["tasks"][0]["items"]
        return np.array([item["values"][value] for item in items])

    def _mslm(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        self.tell(f"$ {shlex.join(('mslm', *arguments))}")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "megatron_slm.cli", *(str(_located(argument)) for argument in arguments)]
        done = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in codes:
            said = done.stdout[-2000:] + done.stderr[-2000:]
            raise SystemExit(f"mslm {shlex.join(arguments)} ended with {done.returncode}:\n{said}")
        return done.stdout


def _located(argument: str) -> str | Path:
    """The recipes lie in the repository, everything else in the pipeline's directory."""
    return ROOT / argument if argument.startswith("examples/sorting/") else argument
