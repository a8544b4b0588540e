"""Whole runs of PPO: the price of distance resumed, a rollout made for other steps, a critic that learns alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.rollout.sampling import Sampling
from megatron_slm.run_rollouts import evaluation_of_answers
from megatron_slm.stages.experience import Judged
from tests import alignment, runs
from tests.ranks import run_ranks

SHAPE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_iters=0",
)
PPO = (
    *SHAPE,
    "stage=ppo",
    "ppo.ppo_epochs=2",
    "rollout.max_new_tokens=6",
    "rollout.prompts=8",
    f"rollout.rewards={alignment.__file__}:digits_right=1",
)
PP2 = ("parallel.pipeline_model_parallel_size=2",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    run = tmp_path_factory.mktemp("base") / "sft"
    assert runs.train(run, data["chat"], 1, *SHAPE, "stage=sft", "train.train_iters=2") == 0
    return run


def test_the_price_of_distance_is_resumed_on_every_rank_and_other_steps_drop_the_rollout(
    tmp_path: Path, data: dict[str, Path], base: Path
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    steered = ("ppo.ppo_kl_target=0.5", "ppo.ppo_kl_horizon=64", "train.train_iters=6", "optimizer.lr=1e-3")
    options = (*PPO, *PP2, *steered, f"checkpoint.pretrained_checkpoint={base}")
    assert runs.train(straight, data["prompt"], 2, *options) == 0
    assert runs.train(stopped, data["prompt"], 2, *options, "train.exit_interval=5") == 75
    assert runs.train(stopped, data["prompt"], 2, *options) == 0
    assert runs.losses(stopped) == runs.losses(straight)
    states = [json.loads((runs.checkpoint_path(run, 6) / "state.json").read_text()) for run in (straight, stopped)]
    prices = [state["records"]["ppo"]["ppo_kl_coef"] for state in states]
    assert prices[0] == prices[1] != 0.05
    logged = [[record.get("objective/kl_coef") for record in runs.records(run)] for run in (straight, stopped)]
    assert logged[0] == logged[1] and logged[0][4] != logged[0][0]

    # Step 7 would be the third of a rollout of four steps; of rollouts of two it is the first.
    other = ("ppo.ppo_epochs=1", "train.train_iters=7")
    assert runs.train(stopped, data["prompt"], 2, *options, *other) == 0
    warned = [line for line in (stopped / "progress.txt").read_text().splitlines() if "the rollout in hand" in line]
    assert len(warned) == 1 and "2 mini-batches of 4 prompts, 2 times" in warned[0]
    assert "2 of 4 prompts, 1 times" in warned[0]
    assert "reward" in runs.records(stopped)[6], "answered anew"


def test_the_critic_learns_while_the_policy_stands_still(tmp_path: Path, data: dict[str, Path], base: Path) -> None:
    run = tmp_path / "run"
    alone = ("optimizer.lr=0", "ppo.ppo_critic_lr=3e-3", "ppo.ppo_kl_coef=0", "train.train_iters=4")
    penalty = ("ppo.ppo_missing_eos_penalty=1",)  # a base that knows nothing is right nowhere
    assert runs.train(run, data["prompt"], 1, *PPO, *alone, *penalty, f"checkpoint.pretrained_checkpoint={base}") == 0
    found = runs.records(run)
    assert found[2]["val/loss"] < found[0]["val/loss"], "the same answers"
    assert {record["policy/approxkl"] for record in found} == {0.0}
    assert "objective/kl" not in found[0], "there is no reference"


class Answers:
    """In the place of a model that samples: what it has said is its prompt's number."""

    sampling = Sampling(4, 1.0, 0, 1.0, 0, ())

    def _replace(self, **given: Any) -> Answers:
        return self

    def answer(self, prompts: list[tuple[int, int]], step: int, plan: Any) -> list[Any]:
        return [
            SimpleNamespace(number=one, completion=SimpleNamespace(finished=one > 0, tokens=(1,) * 4))
            for one, _ in prompts
        ]


def judged(drawn: list[Any], prompts: list[Any]) -> list[Judged]:
    """Prompt 0 has no part; 1 has one of two, so no sum; 2 and 3 have both."""
    parts: list[dict[str, float]] = [{}, {"a": 0.5}, {"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 1.0}]
    values = [parts[one.number] for one in drawn]
    return [Judged(sum(each.values()) if len(each) > 1 else math.nan, each) for each in values]


def answers_measured(numbers: int) -> dict[str, float]:
    source = SimpleNamespace(num_samples=numbers, prompt=lambda number: number)
    plan: Any = SimpleNamespace(groups=SimpleNamespace(dp=dist.group.WORLD), device=torch.device("cpu"))
    config: Any = SimpleNamespace(train=SimpleNamespace(eval_iters=1, global_batch_size=8))
    data: Any = SimpleNamespace(valid={"a": source})
    measure = evaluation_of_answers(config, data, plan, Answers(), judged, ("a", "b"))  # type: ignore[arg-type]
    return measure(SimpleNamespace(step=0))  # type: ignore[arg-type]


def test_each_part_of_held_out_answers_is_a_mean_of_what_was_scored() -> None:
    found = run_ranks(answers_measured, 2, 4)
    assert found[0] == found[1]
    expected = {"reward": 2.0, "rewards/a": 0.5, "rewards/b": 1.5, "finished": 0.75, "length": 4.0}
    assert found[0] == {**expected, "answers": 4.0, "unscored": 2.0}
    (nothing,) = run_ranks(answers_measured, 1, 1)
    assert math.isnan(nothing["reward"]) and math.isnan(nothing["rewards/b"]) and nothing["unscored"] == 1.0
