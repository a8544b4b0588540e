"""``mslm train --downscale`` as a user types it: a cluster's recipe on ranks of this machine, in several runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
preset: gpt2
name: big
parallel: {world_size: 512, tensor_model_parallel_size: 4, sequence_parallel: true}
model: {attention_dropout: 0.0, hidden_dropout: 0.0}
precision: {bf16: true}
data: {data_path: elsewhere/corpus}
train: {train_iters: 10, global_batch_size: 1024}
optimizer: {lr: 5.0e-3}
"""


def mslm(*tokens: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    command = [sys.executable, "-m", "megatron_slm.cli", *tokens]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "big.yaml"
    path.write_text(RECIPE)
    return path


def test_a_large_job_runs_here_in_parts_that_agree(tmp_path: Path, recipe: Path) -> None:
    place = tmp_path / "big-downscaled"
    (place / "tp2").mkdir(parents=True)
    (place / "tp2" / "earlier.txt").write_text("what an earlier downscaling has left")
    ended = mslm("train", str(recipe), "--downscale", "--ranks", "2", f"log.runs_dir={tmp_path}")
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert "data: made-up tokens" in ended.stdout
    assert "not held together by any run, because it takes more ranks: tp with dp" in ended.stdout
    assert (place / "tp2.1" / "earlier.txt").is_file(), "a downscaling starts anew and loses nothing"
    losses = [[float.fromhex(bits) for bits in runs.losses(place / name).values()] for name in ("tp2", "dp2")]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, abs=5e-3), "the runs are one job under two layouts, in bf16"
    assert losses[0][-1] < losses[0][0] - 0.3, "nothing was learned"
    for name in ("tp2", "dp2"):
        kept = load(place / name / "config.yaml").config
        assert violations(kept, 2) == []
        assert [path.name for path in (place / name / "checkpoints").glob("iter_*")] == ["iter_0000010"]
        assert runs.records(place / name, "validation.jsonl")
        assert name in ended.stdout.rpartition("held-out")[2], "the table at the end names every run"


def test_under_a_launcher_it_is_refused(tmp_path: Path, recipe: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = mslm("train", str(recipe), "--downscale", f"log.runs_dir={tmp_path}", **ranks, LOCAL_WORLD_SIZE="1")
    assert ended.returncode == 2 and "without a launcher" in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_corpus_that_is_here_is_read_and_a_damaged_one_refused(tmp_path: Path, recipe: Path) -> None:
    data = runs.corpus(tmp_path)
    ended = mslm("check", str(recipe), "--downscale", f"data.data_path={data}", "model.vocab_size=50257")
    assert ended.returncode == 0 and "made-up" not in ended.stdout
    (data / "train" / "index.json").write_text("{")
    ended = mslm("check", str(recipe), "--downscale", f"data.data_path={data}")
    assert ended.returncode == 2 and "is damaged" in ended.stderr
