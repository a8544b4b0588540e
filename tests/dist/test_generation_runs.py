"""``mslm generate`` as a user types it: several prompts, the run's own ranks or one, and a conversation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import runs

ROOT = Path(__file__).resolve().parents[2]
DIVIDED = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "train.train_iters=2",
    "model.init_method_std=0.2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speaking") / "run"
    assert runs.train(directory, runs.corpus(tmp_path_factory.mktemp("corpus")), 2, *DIVIDED) == 0
    return directory


def mslm(*tokens: str, says: str = "") -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_slm.cli", "generate", *tokens]
    done = subprocess.run(command, input=says, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_prompts_of_a_file_on_the_runs_ranks_and_on_one(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = ["def main", "", "return the parser and then some more of it"]
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in asked))
    options = (str(run), "--prompts", str(prompts), "--max-new-tokens", "6", "--top-p", "0.9")
    code, out, errors = mslm(*options, "--json")
    assert code == 0, errors
    several = objects(out)
    assert [one["prompt"] for one in several] == asked
    for one in several:
        assert len(one["tokens"]) == len(one["logprobs"]) == len(one["raw_logprobs"]) <= 6
        assert all(raw <= processed <= 0.0 for raw, processed in zip(one["raw_logprobs"], one["logprobs"], strict=True))
    code, out, errors = mslm(*options, "--json", "--one-rank", "--batch-size", "1")
    assert code == 0, errors
    for one, other in zip(objects(out), several, strict=True):
        assert (one["tokens"], one["text"], one["finished"]) == (other["tokens"], other["text"], other["finished"])
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
    code, out, errors = mslm(*options)
    assert code == 0 and all(prompt + one["text"] in out for prompt, one in zip(asked, several, strict=True)), errors


def test_a_conversation(run: Path) -> None:
    """Two turns, one that cannot be said, and the first again after /reset: it gets the same answer."""
    options = (str(run), "--chat", "--template", "plain", "--max-new-tokens", "4", "--temperature", "0")
    code, out, errors = mslm(*options, says="one\n\n</s>\n/reset\none\n/exit\nnot heard\n")
    assert code == 0 and "spells the special token </s>" in errors and "Traceback" not in errors, errors
    assert out.strip() and out == 2 * out[: len(out) // 2]
    code, out, errors = mslm(str(run), "--chat")
    assert code == 2 and out == "" and "No chat template lies beside" in errors
