"""``mslm eval`` as a user types it: on the run's own ranks and on one, then one run against the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import alignment, runs

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    "stage=sft",
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "train.eval_iters=0",
    "optimizer.lr=3e-3",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``short`` on one rank and ``long`` on two, and a file of each kind of task."""
    home = tmp_path_factory.mktemp("eval")
    data = alignment.compiled(home)
    assert runs.train(home / "short", data["chat"], 1, *SHAPE, "train.train_iters=10") == 0
    divided = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    assert runs.train(home / "long", data["chat"], 2, *SHAPE, "train.train_iters=50", *divided) == 0
    problems = alignment.problems(30)
    rows: dict[str, list[dict[str, Any]]] = {
        "answers": [{"prompt": one, "answer": right, "verifier": "exact_match"} for one, right, _ in problems],
        "choices": [{"prompt": one, "choices": [wrong, right], "answer": 1} for one, right, wrong in problems],
        "golden": [{"prompt": one, "completion": right, "expected": [-100, 0]} for one, right, _ in problems],
    }
    del rows["answers"][3]["answer"]  # cannot be judged
    for name, content in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return home


def mslm(*tokens: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_slm.cli", "eval", *tokens]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


def measured(made: Path, run: str, name: str, *more: str) -> dict[str, Any]:
    tasks = [word for task in ("answers", "choices", "golden") for word in ("--task", str(made / f"{task}.jsonl"))]
    options = ("--data", str(made / "chat"), "--template", "plain", "--max-new-tokens", "10", "--samples", "2")
    out = made / f"{name}.json"
    code, said, errors = mslm(str(made / run), *tasks, *options, "--temperature", "0.7", "--out", str(out), *more)
    assert code == 0, errors
    assert all(word in said for word in ("perplexity", "accuracy (byte)", "pass@2", "ece", "in range", "first failure"))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_result_is_of_the_model_and_not_of_its_layout(made: Path) -> None:
    several, one = measured(made, "long", "long"), measured(made, "long", "alone", "--one-rank", "--batch-size", "5")
    short = measured(made, "short", "short")
    for task, other in zip(several["tasks"], one["tasks"], strict=True):
        for item, same in zip(task["items"], other["items"], strict=True):
            assert item["values"] == pytest.approx(same["values"], rel=1e-4, abs=1e-4), (task["name"], item["id"])
            assert item.get("samples") == same.get("samples")
    answers = several["tasks"][1]
    assert answers["items"][3]["values"]["unscored"] == 2.0 and "item 3" in answers["first_failure"]
    assert answers["metrics"]["unscored"] == pytest.approx(1 / 30)
    code, said, errors = mslm("compare", str(made / "short.json"), str(made / "long.json"), "--json")
    assert code == 0, errors
    rows = {(row["task"], row["metric"]): row for row in json.loads(said)}
    assert rows["chat", "loss"]["verdict"] == "B is better" and rows["chat", "loss"]["difference"] < -0.5
    assert rows["golden", "in range"]["verdict"] == "no real difference"
    assert rows["answers", "pass@1"]["left_out"] == 1
    code, said, _ = mslm("compare", str(made / "alone.json"), str(made / "long.json"))
    assert code == 0 and said.count("no real difference") == len(rows) and "is better" not in said
    assert short["step"] == 10 and several["tokenizer_hash"] == short["tokenizer_hash"]


def test_what_is_refused_is_said_in_one_line(made: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "choices": ["a", "b"], "answer": 1}\n{"prompt": "p"}\n')
    for options, problem in {
        ("--task", str(bad)): f"{bad}:2 has neither",
        ("--task", str(made / "answers.jsonl"), "--samples", "2"): "--temperature 0",
        ("--data", str(made / "preference")): "preference examples",
        ("--task", str(tmp_path / "none.jsonl")): "none.jsonl",
    }.items():
        code, said, errors = mslm(str(made / "short"), *options)
        assert code == 2 and said == "" and problem in errors and "Traceback" not in errors, errors
