"""Whole runs of the stages after pretraining: each starts from the last, stops and goes on, under several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import alignment, runs

TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)
SHAPE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.train_iters=6",
    "optimizer.lr=1e-3",
)
ROLLOUT = ("rollout.max_new_tokens=10", "rollout.prompts=16", f"rollout.rewards={alignment.__file__}:digits_right=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    """A model that has seen a few hundred answers."""
    run = tmp_path_factory.mktemp("base") / "sft"
    more = ("train.train_iters=40", "train.global_batch_size=16", "train.micro_batch_size=16", "optimizer.lr=3e-3")
    assert runs.train(run, data["chat"], 1, *SHAPE, "stage=sft", *more) == 0
    return run


def of_stage(stage: str, base: Path) -> tuple[str, ...]:
    """Options of a small run of a stage."""
    return (
        *SHAPE,
        f"stage={stage}",
        f"checkpoint.pretrained_checkpoint={base}",
        *{
            "dpo": ("dpo.dpo_sft_weight=0.2",),
            "grpo": ("grpo.grpo_group_size=4", "grpo.grpo_kl_beta=0.05", *ROLLOUT),
            "ppo": ("ppo.ppo_epochs=2", *ROLLOUT),
            "distill": (f"distill.distill_teacher={base}",),
        }.get(stage, ()),
    )


KIND = {
    "sft": "chat",
    "distill": "chat",
    "reward": "preference",
    "dpo": "preference",
    "grpo": "prompt",
    "ppo": "prompt",
}


@pytest.mark.parametrize("stage", KIND)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, data: dict[str, Path], base: Path, stage: str
) -> None:
    """PPO stops at step 5 of rollouts of four steps, GRPO at step 5 of rollouts of two."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = (*of_stage(stage, base), *TP2)
    assert runs.train(straight, data[KIND[stage]], 2, *options) == 0
    assert runs.train(stopped, data[KIND[stage]], 2, *options, "train.exit_interval=5") == 75
    assert runs.train(stopped, data[KIND[stage]], 2, *options) == 0
    assert runs.losses(stopped) == runs.losses(straight)
    found = [runs.contents(runs.checkpoint_path(run, 6)) for run in (straight, stopped)]
    assert runs.differences(*found) == []


@pytest.mark.parametrize("stage", ["dpo", "grpo", "distill"])
def test_a_pipeline_gives_what_one_rank_gives(tmp_path: Path, data: dict[str, Path], base: Path, stage: str) -> None:
    """In float64: the same answers are drawn, and what is logged agrees."""
    exact = ("precision.fp64=true", "train.train_iters=3")
    one, other = tmp_path / "one", tmp_path / "other"
    assert runs.train(one, data[KIND[stage]], 1, *of_stage(stage, base), *exact) == 0
    assert runs.train(other, data[KIND[stage]], 4, *of_stage(stage, base), *exact, *PP2) == 0
    for a, b in zip(*(runs.records(run) for run in (one, other)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-9)
        logged = {"reward", "completions/mean_length", "objective/kl", "rewards/accuracies", "accuracy"} & a.keys()
        for name in logged:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-12), name


def test_what_a_stage_does_not_read_is_refused(tmp_path: Path, data: dict[str, Path], base: Path) -> None:
    from megatron_slm.config.load import load
    from megatron_slm.config.rules import violations

    given = runs.given(tmp_path / "run", data["chat"], *SHAPE, "stage=sft", "dpo.dpo_beta=0.2", "rollout.prompts=8")
    found = "\n".join(violations(load(None, given).config))
    assert "dpo.dpo_beta = 0.2" in found and "rollout.prompts = 8" in found
    given = runs.given(tmp_path / "run", data["preference"], *SHAPE, "stage=dpo")
    assert "checkpoint.pretrained_checkpoint" in "\n".join(violations(load(None, given).config))


def test_the_first_step_is_that_of_an_equal_pair(tmp_path: Path, data: dict[str, Path], base: Path) -> None:
    """DPO starts at ln 2, GRPO with ratio 1 and no distance, a teacher at no distance from itself."""
    first = {}
    for stage in ("dpo", "grpo", "distill"):
        run = tmp_path / stage
        options = [each for each in of_stage(stage, base) if "sft_weight" not in each]
        assert runs.train(run, data[KIND[stage]], 1, *options, "train.train_iters=1") == 0
        first[stage] = runs.records(run)[0]
    assert first["dpo"]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["dpo"]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["grpo"]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["grpo"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["grpo"]["rollout/logp_diff_max"] < 1e-5
    assert first["distill"]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert json.loads((tmp_path / "dpo" / "data.json").read_text())["sources"]["preference"]["digest"]
