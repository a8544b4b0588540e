"""Whole runs that are judged: a verifier that fails and a divided reward model; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import alignment, runs
from tests.example_files import compiled, pieces
from tests.ranks import RankFailure

SHAPE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.train_iters=2",
    "train.eval_iters=0",
)
MOODY = """
import time
def moody(answer, fields):
    number = int(fields["answer"][0])
    if number == 0:
        raise ValueError("not today")
    if number == 1:
        time.sleep(60)
    return 1.0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    run = tmp_path_factory.mktemp("models") / "reward"
    assert runs.train(run, data["preference"], 1, *SHAPE, "stage=reward", "reward.reward_head_init_std=0.5") == 0
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    run = tmp_path_factory.mktemp("models") / "base"
    assert runs.train(run, data["chat"], 1, *SHAPE, "stage=sft") == 0
    return run


def test_a_run_goes_on_when_a_verifier_fails_and_counts_it(
    tmp_path: Path, data: dict[str, Path], base: Path, reward_model: Path
) -> None:
    """Weighted parts, a divided reward model, and what is watched; one verifier raises and hangs now and then."""
    run, own = tmp_path / "run", tmp_path / "own.py"
    own.write_text(MOODY)
    options = (
        "stage=grpo",
        f"checkpoint.pretrained_checkpoint={base}",
        "grpo.grpo_group_size=2",
        "rollout.max_new_tokens=8",
        f"rollout.rewards={own}:moody=2,model=0.5",
        "rollout.watched=exact_match",
        f"rollout.reward_model={reward_model}",
        "rollout.reward_timeout_s=0.3",
        "parallel.tensor_model_parallel_size=2",
    )
    assert runs.train(run, data["prompt"], 2, *SHAPE, *options) == 0
    records = runs.records(run)
    assert len(records) == 2 and any(0 < one["completions/unscored_ratio"] < 1 for one in records)
    for one in records:
        scored = 2 * one["rewards/moody/mean"] + 0.5 * one["rewards/model/mean"]
        assert one["rewards/moody/mean"] == 1.0 and one["rewards/exact_match/mean"] == 0.0
        assert one["rewards/model/std"] > 0 and abs(one["reward"] - scored) < 3.0
    log = (run / "log.txt").read_text()
    assert log.count("moody could not judge") == 1


def test_a_step_whose_answers_nobody_can_score_is_skipped(tmp_path: Path, data: dict[str, Path], base: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "own.py"
    own.write_text("def silent(answer, fields):\n    raise ValueError('no opinion')\n")
    options = (
        "stage=grpo",
        f"checkpoint.pretrained_checkpoint={base}",
        "grpo.grpo_group_size=2",
        "rollout.max_new_tokens=8",
        f"rollout.rewards={own}:silent=1",
        "train.max_interventions=2",
    )
    assert runs.train(run, data["prompt"], 1, *SHAPE, "train.train_iters=2", *options) == 0
    records = runs.records(run)
    assert [one["skipped"] for one in records] == [True, True]
    log = (run / "log.txt").read_text()
    assert "no answer has a score" in log and "no opinion" in log

    with pytest.raises(RankFailure, match="used up train.max_interventions = 2.*could not be scored"):
        runs.train(tmp_path / "longer", data["prompt"], 1, *SHAPE, "train.train_iters=3", *options)


def test_reward_models_that_do_not_fit_are_refused(
    tmp_path: Path, data: dict[str, Path], base: Path, reward_model: Path
) -> None:
    foreign = tmp_path / "foreign"
    rows = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(20)]
    tokenizer = pieces(tmp_path / "other").path
    compiled(tmp_path, rows, tokenizer, kind="preference", seq_length=alignment.SEQ_LENGTH)
    assert runs.train(foreign, tmp_path / "out", 1, *SHAPE, "stage=reward") == 0
    known = f"rollout.reward_model={reward_model}"
    for more, problem in {
        (f"rollout.reward_model={base}",): "trained with stage sft",
        (f"rollout.reward_model={foreign}",): "another tokenizer",
        (known, "rollout.max_new_tokens=42"): "Set rollout.max_new_tokens=41",
        (known, "rollout.rewards=regx"): "did you mean regex",
    }.items():
        options = ("stage=grpo", f"checkpoint.pretrained_checkpoint={base}", "grpo.grpo_group_size=2", *more)
        with pytest.raises(RankFailure, match=problem) as refusal:
            runs.train(tmp_path / "run", data["prompt"], 1, *SHAPE, "rollout.max_new_tokens=8", *options, fresh=True)
        assert refusal.value.code == 2 and "Traceback" not in str(refusal.value)
