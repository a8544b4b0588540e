"""``mslm train --lr-range-test`` as a user types it, and whether its suggestion is worth following."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.commands import training
from tests import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def range_test(run: Path, data: Path, *tokens: str) -> subprocess.CompletedProcess[str]:
    own = (f"name={run.name}", f"log.runs_dir={run.parent}", f"data.data_path={data}")
    command = [sys.executable, "-m", "megatron_slm.cli", "train", *runs.TINY, *own, *tokens]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def last_loss(run: Path) -> float:
    return sum(record["lm_loss"] for record in runs.records(run)[-5:]) / 5


def test_a_suggestion_is_written_said_and_worth_following(tmp_path: Path, data: Path) -> None:
    """On two ranks, which the trainings that follow the suggestion, or a hundredth of it, do not need."""
    run, place = tmp_path / "run", tmp_path / "run-lr-range-test"
    tp2 = "parallel.tensor_model_parallel_size=2"
    ended = range_test(run, data, "--lr-range-test", "train.train_iters=40", "schedule.lr_warmup_iters=10", tp2)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((place / "lr_range_test.json").read_text())
    count = len(record["steps"])
    assert 20 < count <= 40 and all(len(record[key]) == count for key in ("learning_rates", "losses"))
    assert record["learning_rates"][0] == pytest.approx(1e-7), "no warm-up"
    assert (place / "lr_range_test.png").stat().st_size > 10_000
    suggestion = record["suggestion"]["steepest"]
    assert 1e-7 < suggestion < 1.0 and 1e-7 <= record["suggestion"]["minimum_over_10"] < 1.0
    assert f"optimizer.lr={suggestion:.1e}\n" in ended.stdout
    assert not run.exists() and not list(place.glob("checkpoints/*")), "nothing but the test itself"

    options = ("train.train_iters=40", "train.eval_iters=0", "schedule.lr_warmup_iters=5", "log.tensorboard=false")
    for name, rate in (("suggested", suggestion), ("timid", suggestion / 100)):
        assert runs.train(tmp_path / name, data, 1, *options, f"optimizer.lr={rate}") == 0
    assert last_loss(tmp_path / "suggested") < last_loss(tmp_path / "timid") - 0.3


def test_a_loss_that_explodes_ends_the_test_in_order(tmp_path: Path, data: Path) -> None:
    """A rate that makes infinities within a few steps is no error: finding it is the purpose."""
    place = tmp_path / "run-lr-range-test"
    place.mkdir()
    (place / "of an earlier test").touch()
    tokens = ("--lr-range-test", "1e-3:1e30", "train.train_iters=40", "optimizer.clip_grad=0", "log.tensorboard=false")
    ended = range_test(tmp_path / "run", data, *tokens)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((place / "lr_range_test.json").read_text())
    assert (record["low"], record["high"]) == (1e-3, 1e30)
    assert 3 < len(record["steps"]) < 40 and all(math.isfinite(loss) for loss in record["losses"])
    assert (tmp_path / "run-lr-range-test.1" / "of an earlier test").exists(), "moved aside, not lost"


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["--lr-range-test", "1:1e-7"], "LOW must be above 0 and HIGH above LOW"),
        (["--lr-range-test", "train.train_iters=5"], "train.train_iters = 5"),
        (["--lr-range-test", "--fresh"], "not allowed with"),
    ],
)
def test_what_makes_no_test_is_refused(tmp_path: Path, data: Path, tokens: list[str], said: str) -> None:
    ended = range_test(tmp_path / "run", data, *tokens)
    assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("run*"))


def test_a_configuration_after_the_option_is_not_taken_for_its_range() -> None:
    given = ["--lr-range-test", "run.yaml", "--lr", "1e-3"]
    assert training._with_range(given) == ["--lr-range-test", "1e-7:1", "run.yaml", "--lr", "1e-3"]
    assert training._with_range(["--lr-range-test"]) == ["--lr-range-test", "1e-7:1"]
    for written in (["--lr-range-test", "1e-5:1", "a.b=c"], ["--lr-range-test=1e-5:1", "x.yaml"]):
        assert training._with_range(written) == written
