"""What a run is compared with stays what it began with: after a roll-back, and when its parent has trained on.

With a rate near 0 the policy is its reference, so that DPO's loss is ln 2 in every step whose reference is right.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import alignment, runs
from tests.ranks import RankFailure

SHAPE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.eval_iters=0",
    "optimizer.lr=1e-2",
)
STILL = ("stage=dpo", "optimizer.lr=1e-12", "optimizer.min_lr=0")
BAD_SAMPLE = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


def based(tmp_path: Path, data: dict[str, Path]) -> tuple[Path, tuple[str, ...]]:
    """A parent of two steps, and the options of a run that starts from it."""
    base = tmp_path / "base"
    assert runs.train(base, data["chat"], 1, *SHAPE, "stage=sft", "train.train_iters=2") == 0
    return base, (*SHAPE, *STILL, f"checkpoint.pretrained_checkpoint={base}")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in runs.records(run)]


def infinite_once() -> None:
    """The step that begins at ``BAD_SAMPLE`` has a loss that is not finite."""
    from megatron_slm.run_reference import PairReference

    original = PairReference.complete

    def spoiled(self: Any, batches: list[dict[str, Any]], *rest: Any) -> None:
        original(self, batches, *rest)
        if self._state.cursor.consumed_samples == BAD_SAMPLE:
            for batch in batches:
                batch["ref_logprobs"].fill_(math.inf)

    PairReference.complete = spoiled  # type: ignore[method-assign]


def test_rows_behind_what_was_passed_over_have_their_reference(tmp_path: Path, data: dict[str, Path]) -> None:
    _, options = based(tmp_path, data)
    run = tmp_path / "dpo"
    more = ("train.train_iters=6", "train.non_finite_policy=rollback", "checkpoint.save_interval=2")
    assert runs.train(run, data["preference"], 2, *options, *more, plant=infinite_once) == 0
    assert runs.records(run)[-1]["skipped_samples"] == 16
    assert losses(run) == pytest.approx([math.log(2)] * 6, abs=1e-6)
    with np.load(run / "reference_train.npz") as file:
        taken = np.isfinite(file["preference sums"])
    assert 0 < taken.sum() < len(taken), "only what the run reads"


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_the_reference_is_the_parent_as_it_was(tmp_path: Path, data: dict[str, Path], reference: str) -> None:
    base, options = based(tmp_path, data)
    run = tmp_path / "dpo"
    options = (*options, f"dpo.dpo_reference={reference}")
    assert runs.train(run, data["preference"], 1, *options, "train.train_iters=1") == 0
    assert runs.train(base, data["chat"], 1, *SHAPE, "stage=sft", "train.train_iters=4") == 0
    assert runs.train(run, data["preference"], 1, *options, "train.train_iters=2") == 0
    assert losses(run) == pytest.approx([math.log(2)] * 2, abs=1e-6)
    shutil.rmtree(runs.checkpoint_path(base, 2))
    with pytest.raises(RankFailure, match="does not hold the checkpoint that this run began with") as failure:
        runs.train(run, data["preference"], 1, *options, "train.train_iters=3")
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)


def test_kept_numbers_of_another_parent_are_taken_anew(tmp_path: Path, data: dict[str, Path]) -> None:
    base, options = based(tmp_path, data)
    run = tmp_path / "dpo"
    options = (*options, "train.train_iters=1")
    assert runs.train(run, data["preference"], 1, *options) == 0
    assert runs.train(base, data["chat"], 1, *SHAPE, "stage=sft", "train.train_iters=4") == 0
    # As if a start had been interrupted before its first checkpoint.
    shutil.rmtree(run / "checkpoints")
    assert runs.train(run, data["preference"], 1, *options) == 0
    assert losses(run) == pytest.approx([math.log(2)], abs=1e-6)
    log = (run / "log.txt").read_text()
    assert "and this run began with another" in log and "iter_0000002" in log
