"""The chains of examples/sorting as they are written, a few steps each: every recipe finds what the last one left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import alignment, runs
from tests.ranks import run_ranks

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "sorting"
FEW = (
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.train_iters=4",
    "train.eval_iters=0",
    "log.progress_bar=false",
    "log.tensorboard=false",
    "parallel.device=cpu",
)


def train(recipe: str, overrides: tuple[str, ...]) -> int:
    """One rank of ``mslm train examples/sorting/RECIPE.yaml``."""
    from megatron_slm import run
    from megatron_slm.config.load import load

    return run.train(load(RECIPES / f"{recipe}.yaml", overrides), runs.rank_environment(), fresh=False)


def store(home: Path) -> None:
    from megatron_slm.run_teacher import Wanted, store_teacher

    wanted = Wanted(home / "sort-sft", home / "chat", home / "teacher", 16)
    store_teacher(wanted, environment=runs.rank_environment())


def answer(run: Path) -> str:
    """What ``mslm generate`` says with a run's policy."""
    from megatron_slm.run_generate import Manner, generate

    return "".join(generate(run, "sort 3 1", Manner(max_new_tokens=2), environment=runs.rank_environment()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's data, compiled, and what the first recipes train: pretraining, SFT from it, a reward model."""
    home = tmp_path_factory.mktemp("recipes")
    alignment.compiled(home)
    trained(home, "pretrain", "corpus")
    trained(home, "sft", "chat", f"checkpoint.pretrained_checkpoint={home / 'sort-pretrain'}")
    trained(home, "reward", "preference", after(home))
    return home


def trained(home: Path, recipe: str, data: str, *overrides: str, code: int = 0) -> None:
    own = (f"log.runs_dir={home}", f"data.data_path={home / data}", *FEW, *overrides)
    given = {item.split("=")[0]: item for item in own}
    assert set(run_ranks(train, 2, recipe, tuple(given.values()))) == {code}


def after(home: Path) -> str:
    return f"checkpoint.pretrained_checkpoint={home / 'sort-sft'}"


def goes_on(home: Path, recipe: str, data: str, *overrides: str) -> list[str]:
    """Losses of a run that stops after its third step and is started again: as one that does not stop has them."""
    name = f"sort-{recipe}"
    trained(home, recipe, data, *overrides)
    trained(home, recipe, data, *overrides, f"name={name}-again", "train.exit_interval=3", code=75)
    trained(home, recipe, data, *overrides, f"name={name}-again")
    losses = runs.losses(home / name)
    assert len(losses) == 4 and runs.losses(home / f"{name}-again") == losses
    return list(losses.values())


def test_sft_and_dpo_start_from_what_was_pretrained(home: Path) -> None:
    trained(home, "dpo", "preference", after(home), "dpo.dpo_sft_weight=0")
    assert runs.records(home / "sort-dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert runs.records(home / "sort-sft")[0]["loss"] < runs.records(home / "sort-pretrain")[0]["lm_loss"]


def test_ppo_learns_from_the_reward_model_and_watches_the_truth(home: Path) -> None:
    small = ("ppo.ppo_epochs=1", "rollout.batch_size=8", f"model.seq_length={alignment.SEQ_LENGTH}")
    goes_on(home, "ppo-rm", "prompt", after(home), f"rollout.reward_model={home / 'sort-reward'}", *small)
    found = runs.records(home / "sort-ppo-rm")[0]
    assert len(set(run_ranks(answer, 2, home / "sort-ppo-rm"))) == 1  # the policy without its critic
    assert found["rewards/model/mean"] == found["reward"] != 0.0 and "rewards/exact_match/mean" in found


def test_a_student_learns_from_the_stored_teacher(home: Path) -> None:
    run_ranks(store, 2, home)
    goes_on(home, "distill-topk", "chat", f"distill.distill_teacher={home / 'teacher'}")
