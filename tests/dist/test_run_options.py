"""Whole runs whose batch grows, whose objective has further terms, or that end early."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs

RAMP = ("train.rampup_batch_size=4,4,16", "train.global_batch_size=12", "train.train_iters=5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def test_a_batch_grows_and_a_resume_grows_on(tmp_path: Path, data: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert runs.train(straight, data, 2, *RAMP) == 0
    assert runs.train(resumed, data, 2, *RAMP, "train.exit_interval=2") == 75
    assert runs.train(resumed, data, 1, *RAMP) == 0
    for run in (straight, resumed):
        sizes = [(record["consumed_samples"], record["batch_size"]) for record in runs.records(run)]
        assert sizes == [(4, 4), (8, 4), (16, 8), (28, 12), (40, 12)]
    digests = [[record["sample_digest"] for record in runs.records(run)] for run in (straight, resumed)]
    assert digests[0] == digests[1]


OBJECTIVE = ("train.z_loss_coefficient=1e-2", "train.label_smoothing=0.1", "train.train_iters=3")


def test_the_log_keeps_the_cross_entropy_apart_from_the_objective(tmp_path: Path, data: Path) -> None:
    """The first losses are of the same weights: the cross-entropy does not depend on the objective."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    assert runs.train(plain, data, 4, "train.train_iters=3", *layout) == 0
    assert runs.train(other, data, 4, *OBJECTIVE, *layout) == 0
    first, second = runs.records(plain), runs.records(other)
    assert "objective" not in first[0] and "z_loss" not in first[0]
    assert first[0]["lm_loss_bits"] == second[0]["lm_loss_bits"] and first[2]["lm_loss"] != second[2]["lm_loss"]
    # Nearly uniform at first: log Z and the cross-entropy are about log 512, and smoothing changes little.
    assert second[0]["z_loss"] == pytest.approx(1e-2 * second[0]["lm_loss"] ** 2, rel=0.1)
    rest = second[0]["objective"] - second[0]["z_loss"]
    assert rest != second[0]["lm_loss"] and rest == pytest.approx(second[0]["lm_loss"], rel=0.05)
    validations = [runs.records(run, "validation.jsonl")[0]["lm_loss_bits"] for run in (plain, other)]
    assert validations[0] == validations[1]


def test_a_run_without_improvement_ends_early_and_stays_ended(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    # Weights that do not move have no second best: the validation at step 0 stays the best.
    still = ("optimizer.lr=0", "train.eval_interval=1", "train.train_iters=9")
    patience = "train.early_stopping_patience=3"
    assert runs.train(run, data, 2, *still, patience, "train.exit_interval=2") == 75
    assert runs.train(run, data, 2, *still, patience) == 0
    assert list(runs.losses(run)) == [1, 2, 3]
    line = "early stopping at step 3: 3 validations without a new best held-out loss"
    log = (run / "log.txt").read_text()
    assert log.count(line) == 1 and "at step 0" in log
    assert runs.train(run, data, 2, *still, patience) == 0
    assert list(runs.losses(run)) == [1, 2, 3] and (run / "log.txt").read_text().count(line) == 2
    assert runs.train(run, data, 2, *still, "train.early_stopping_patience=5") == 0
    assert list(runs.losses(run)) == [1, 2, 3, 4, 5]
