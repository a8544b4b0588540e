"""A recording is enough to make its steps again: elsewhere, without the corpus, from a fresh checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.errors import ReplayError
from megatron_slm.replay import capsule as capsules, kept
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.step import replay_step
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
RECORD = (
    "replay.level=light",
    "replay.keep_batches=3",
    "parallel.world_size=3",
    "train.global_batch_size=6",
    "parallel.use_distributed_optimizer=true",
    "model.attention_dropout=0.1",
    "train.train_iters=5",
    "train.eval_interval=2",
    "checkpoint.save_interval=2",
)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run in another place than where it was made, its corpus gone."""
    there = tmp_path_factory.mktemp("there")
    data = there / "corpus"
    shutil.copytree(runs.corpus(tmp_path_factory.mktemp("text")), data)
    assert runs.train(there / "run", data, 3, *RECORD) == 0
    shutil.rmtree(data)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "kept"
    shutil.copytree(there / "run", elsewhere)
    shutil.rmtree(there)
    return elsewhere


def mslm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program of a checkout, in it."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "megatron_slm.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, check=False, timeout=200
    )


def git(*arguments: str | Path) -> None:
    subprocess.run(["git", *map(str, arguments)], check=True, capture_output=True)


def test_a_step_is_made_again_by_a_fresh_checkout_from_the_run_alone(moved: Path, tmp_path: Path) -> None:
    recorded = Capsule.of(moved).manifest(5)["code"]
    if recorded["commit"] is None:
        pytest.skip("these sources lie in no repository")
    clone = tmp_path / "clone"
    git("clone", "--quiet", ROOT, clone)
    git("-C", clone, "checkout", "--quiet", recorded["commit"])
    if recorded["diff_sha256"] is not None:
        git("-C", clone, "apply", moved / "replay" / recorded["diff"])
    file = clone / "kernels" / "row_products.py"
    text = file.read_text()
    file.write_text(text + "# another\n")
    refused = mslm(clone, "replay", "step", str(moved), "5")
    assert refused.returncode == 1 and "source files: sha256 " in refused.stderr, refused.stderr
    assert f"git checkout {recorded['commit']}" in refused.stderr
    file.write_text(text)
    made = mslm(clone, "replay", "step", str(moved), "5")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "equal: step 5 replayed from step 4 from the batches that were kept" in made.stdout
    assert "although other" not in made.stdout
    again = Capsule.of(moved.with_name("kept-replay") / "step-0000005")
    assert again.manifest(5)["data"] == Capsule.of(moved).manifest(5)["data"]


def test_what_is_missing_is_named(moved: Path, tmp_path: Path) -> None:
    recording = Capsule.of(moved)
    with pytest.raises(ReplayError, match=r"(?s)Steps 1 to 2.*no checkpoint before it is left.*corpus corpus.*is gone"):
        replay_step(recording, 2, runs.start)
    with pytest.raises(ReplayError, match="rank 0 has those of steps 3 to 5, and step 1 is needed"):
        replay_step(recording, 2, runs.start)
    without = tmp_path / "without"
    shutil.copytree(moved, without)
    shutil.rmtree(without / "checkpoints" / "iter_0000004")
    kept.batch_path(without / "replay", 1, 4).unlink()
    with pytest.raises(ReplayError, match="rank 1 has those of steps 3 to 5, and step 4 is needed"):
        replay_step(Capsule.of(without), 5, runs.start)


def edit(folder: Path, path: Path, **changes: Any) -> None:
    found = json.loads((folder / path.name).read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section] = {**found[section], name: value}
    (folder / path.name).write_text(json.dumps(found))


def test_other_conditions_are_refused_by_name_and_forced(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    folder = other / "replay"
    versions = Capsule.of(moved).manifest(5)["surroundings"]["versions"]
    edit(folder, capsules.run_path(folder, 0), surroundings__versions={**versions, "torch": "2.0.1"})
    edit(folder, capsules.run_path(folder, 0), surroundings__cpu="another", code__sources_sha256="0" * 64)
    edit(folder, capsules.rank_path(folder, 2, 0), threads__intra_op=7)
    monkeypatch.setenv("ONEDNN_EXAMPLE", "1")
    assert cli.main(["replay", "step", str(other), "5"]) == 1
    said = capsys.readouterr().err
    for reason in ("source files: sha256 000000000000 when", "version of torch: 2.0.1 when", "install torch==2.0.1"):
        assert reason in said
    assert "processor: another when" in said and "threads: rank 0 1, rank 1 1, rank 2 7 when" in said
    assert not other.with_name("other-replay").exists(), "nothing was started"
    assert "variable ONEDNN_EXAMPLE: not set when it was recorded, 1 here; unset ONEDNN_EXAMPLE" in said
    forced = mslm(ROOT, "replay", "step", str(other), "5", "--force")
    assert forced.returncode == 0 and "although other: version of torch" in forced.stdout, forced.stderr
    assert "equal: step 5" in forced.stdout
