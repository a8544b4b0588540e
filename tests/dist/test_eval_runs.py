"""``mslm eval`` as a user types it: on the run's own ranks and on one, then one run against the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_slm.evaluate.compare import compare
from megatron_slm.run_eval import Wanted, evaluate
from megatron_slm.run_generate import Manner
from tests import alignment, runs
from tests.ranks import RankFailure, run_ranks

PROBLEMS = 14
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
    problems = alignment.problems(PROBLEMS)
    rows: dict[str, list[dict[str, Any]]] = {
        "answers": [{"prompt": one, "answer": right, "verifier": "exact_match"} for one, right, _ in problems],
        "choices": [{"prompt": one, "choices": [wrong, right], "answer": 1} for one, right, wrong in problems],
        "golden": [{"prompt": one, "completion": right, "expected": [-100, 0]} for one, right, _ in problems],
    }
    del rows["answers"][3]["answer"]  # cannot be judged
    for name, content in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return home


def wanted(made: Path, batch_size: int = 16) -> Wanted:
    tasks = tuple(made / f"{task}.jsonl" for task in ("answers", "choices", "golden"))
    manner = Manner(max_new_tokens=6, temperature=0.7, top_k=0)
    return Wanted(
        tasks, (made / "chat",), limit=PROBLEMS, template="plain", samples=2, manner=manner, batch_size=batch_size
    )


def measured(run: Path, asked: Wanted) -> Any:
    """The result of one rank alone, or of this rank's part of the model; as it is written."""
    from megatron_slm.commands.eval import _finite

    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return _finite(evaluate(run, asked))
    return evaluate(run, asked, environment=runs.rank_environment())


def mslm(*tokens: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_slm.cli", "eval", *tokens]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_result_is_of_the_model_and_not_of_its_layout(made: Path) -> None:
    """The command on the run's two ranks, one rank in another batch size, and a run that has learned less."""
    asked = wanted(made)
    files = [word for path in asked.tasks for word in ("--task", str(path))]
    options = ("--data", str(made / "chat"), "--limit", str(PROBLEMS), "--template", "plain", "--samples", "2")
    drawn = ("--max-new-tokens", "6", "--temperature", "0.7", "--out", str(made / "long.json"))
    said = mslm(str(made / "long"), *files, *options, *drawn)
    assert all(word in said for word in ("perplexity", "accuracy (byte)", "pass@2", "ece", "in range", "first failure"))
    several = json.loads((made / "long.json").read_text())
    one, short = (run_ranks(measured, 1, made / run, asked)[0] for run in ("long", "short"))
    for task, other in zip(several["tasks"], one["tasks"], strict=True):
        for item, same in zip(task["items"], other["items"], strict=True):
            assert item["values"] == pytest.approx(same["values"], rel=1e-4, abs=1e-4), (task["name"], item["id"])
            assert item.get("samples") == same.get("samples")
    answers = several["tasks"][1]
    assert answers["items"][3]["values"]["unscored"] == 2.0 and "item 3" in answers["first_failure"]
    assert answers["metrics"]["unscored"] == pytest.approx(1 / PROBLEMS)
    rows = {(row.task, row.metric): row for row in compare(short, several, resamples=500, seed=0)}
    assert rows["chat", "loss"].verdict == "B is better" and rows["chat", "loss"].found.difference < -0.5
    assert rows["golden", "in range"].verdict == "no real difference"
    assert rows["answers", "pass@1"].left_out == 1 and short["step"] == 10
    assert {row.verdict for row in compare(one, several, resamples=500, seed=0)} == {"no real difference"}


def test_two_ranks_say_it_once_and_what_is_refused_is_refused(made: Path, tmp_path: Path) -> None:
    asked = replace(wanted(made), tasks=(made / "golden.jsonl",), data=())
    first, second = run_ranks(measured, 2, made / "long", asked)
    assert second is None and first["tasks"][0]["metrics"]["in range"] == 1.0
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "choices": ["a", "b"], "answer": 1}\n{"prompt": "p"}\n')
    for own, problem in {
        replace(asked, tasks=(bad,)): "bad.jsonl:2 has neither",
        replace(asked, manner=Manner(temperature=0.0)): "--temperature 0",
        replace(asked, tasks=(), data=(made / "preference",)): "preference examples",
        replace(asked, tasks=(tmp_path / "none.jsonl",)): "none.jsonl",
    }.items():
        with pytest.raises(RankFailure, match=problem) as refusal:
            run_ranks(measured, 1, made / "short", own)
        assert refusal.value.code == 2
