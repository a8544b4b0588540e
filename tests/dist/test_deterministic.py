"""``train.deterministic`` in whole runs: equal bits on three ranks, and a refusal where they could not be promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_slm import cli
from tests import runs
from tests.ranks import RankFailure

# Two ranks would prove nothing of order: a + b commutes.
RANKS = 3
GIVEN = (
    "train.deterministic=true",
    "train.global_batch_size=6",
    "parallel.ddp_bucket_size=2000",
    "parallel.overlap_grad_reduce=true",
    "precision.bf16=true",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def test_two_runs_are_equal_and_other_threads_are_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        assert runs.train(tmp_path / name, data, RANKS, *GIVEN, "train.train_iters=4", plant=notice_switch) == 0
    first, second = (tmp_path / name for name in ("first", "second"))
    assert len(runs.losses(first)) == 4 and runs.losses(first) == runs.losses(second)
    left, right = (runs.contents(runs.checkpoint_path(run, 4)) for run in (first, second))
    assert runs.differences(left, right) == []
    kept = json.loads((first / "environment.json").read_text())["determinism"]
    assert kept["threads"] == 1 and kept["layout"]["dp"] == RANKS

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with pytest.raises(RankFailure, match="threads: 1 there, 2 now") as refused:
        runs.train(first, data, RANKS, *GIVEN, "train.train_iters=5")
    assert refused.value.code == 2
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    going_on = ("train.train_iters=5", "train.deterministic=false")
    assert runs.train(first, data, RANKS, *GIVEN, *going_on) == 0


def notice_switch() -> None:
    """Ends the rank if its loop begins without torch's deterministic algorithms."""
    import torch

    from megatron_slm import run

    loop = run.run_loop

    def watched(*arguments: object, **named: object) -> int:
        assert torch.are_deterministic_algorithms_enabled(), "the loop begins before the switch is on"
        return loop(*arguments, **named)  # type: ignore[arg-type]

    run.run_loop = watched


def test_ranks_are_refused_where_nothing_says_how_many_threads(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before a rank starts: the launcher would choose their threads by the machine's cores."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cli.main(["train", *runs.given(tmp_path / "runs" / "held", data, *GIVEN, "parallel.world_size=3")]) == 2
    assert "compute threads: OMP_NUM_THREADS is not set" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
