"""``mslm diagnose`` on whole runs: sick ones, each from its cause, and sound ones of several kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.diagnose import records
from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.rules import diagnose
from tests import alignment, runs
from tests.breadth import BREADTH, widely

STEPS, BATCH = 60, 8
SMALL = (
    f"train.train_iters={STEPS}",
    "train.eval_interval=20",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "log.layer_norms_interval=10",
    "log.tensorboard=false",
    "optimizer.lr=1e-2",
)
WIDER = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
)
RESUMED_AT, SPIKED_AT = 30, 45


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def findings(run: Path, against: Path | None = None) -> dict[str, Finding]:
    found = diagnose(records.read(run, against=against))
    return {finding.name: finding for finding in found.findings}


def change_batches(change: Callable[[dict[str, Any]], None], first: int, last: int) -> None:
    """Let the loader change the batches of steps ``first`` .. ``last``."""
    from megatron_slm.data.loader import TrainLoader

    original = TrainLoader.micro_batches

    def changed(self: Any, cursor: Any, size: int) -> Any:
        for batch in original(self, cursor, size):
            if first <= cursor.consumed_samples // BATCH + 1 <= last:
                change(batch)
            yield batch

    TrainLoader.micro_batches = changed  # type: ignore[method-assign]


def one_token(batch: dict[str, Any]) -> None:
    batch["tokens"].fill_(9)
    batch["labels"].fill_(9)


def infinite(batch: dict[str, Any]) -> None:
    batch["loss_mask"][0, 0] = float("inf")


def unlikely_labels(batch: dict[str, Any]) -> None:
    """Control characters' byte pieces never follow anything in the corpus."""
    batch["labels"].fill_(7)


SOUND = {
    "cosine": (1, ()),
    "constant rate, warm-up": (1, ("schedule.lr_decay_style=constant", "schedule.lr_warmup_iters=5")),
    "two ranks, another seed": (2, ("train.seed=7",)),
    "small rate": (1, ("optimizer.lr=2e-3", "train.seed=11")),
    "ramp-up, averaged weights": (1, ("train.rampup_batch_size=4,4,80", "train.ema_decay=0.9")),
}


@pytest.mark.parametrize("kind", widely(SOUND, "cosine"))
def test_sound_runs_have_nothing(tmp_path: Path, data: Path, kind: str) -> None:
    world_size, overrides = SOUND[kind]
    assert runs.train(tmp_path / "run", data, world_size, *SMALL, *overrides) == 0
    found = diagnose(records.read(tmp_path / "run"))
    assert not found.findings
    assert {"divergence", "spike", "late-instability", "plateau", "dead-gradients", "data-order"} <= set(found.sound)


def test_a_rate_that_is_too_high_diverges(tmp_path: Path, data: Path) -> None:
    hot = ("optimizer.lr=5.0", "schedule.lr_decay_style=constant", "optimizer.clip_grad=0")
    assert runs.train(tmp_path / "run", data, 1, *SMALL, *WIDER, *hot) == 0
    found = findings(tmp_path / "run")
    assert found["divergence"].step < 10 and "gradients are not clipped" in found["divergence"].causes[:2]
    assert not {"spike", "late-instability", "plateau"} & set(found)


def test_a_loss_that_is_not_finite_is_named_from_the_log(tmp_path: Path, data: Path) -> None:
    from tests.ranks import RankFailure

    with pytest.raises(RankFailure):
        runs.train(tmp_path / "run", data, 1, *SMALL, plant=partial(change_batches, infinite, 25, 25))
    found = findings(tmp_path / "run")
    assert set(found) == {"divergence"} and found["divergence"].step == 25


def test_a_bad_batch_is_a_spike(tmp_path: Path, data: Path) -> None:
    plant = partial(change_batches, unlikely_labels, SPIKED_AT, SPIKED_AT)
    assert runs.train(tmp_path / "run", data, 1, *SMALL, plant=plant) == 0
    found = findings(tmp_path / "run")
    assert set(found) == {"spike"} and found["spike"].step == SPIKED_AT
    first = (SPIKED_AT - 1) * BATCH
    assert f"positions {first} to {first + BATCH - 1}" in found["spike"].evidence[-1]


def test_a_rate_of_zero_is_a_plateau(tmp_path: Path, data: Path) -> None:
    assert runs.train(tmp_path / "run", data, 1, *SMALL, "optimizer.lr=0.0") == 0
    found = findings(tmp_path / "run")
    assert set(found) == {"plateau"} and "learning rate is 0" in found["plateau"].causes[0]


@BREADTH
def test_data_of_one_token_is_a_plateau(tmp_path: Path, data: Path) -> None:
    plant = partial(change_batches, one_token, 1, STEPS)
    assert runs.train(tmp_path / "run", data, 1, *SMALL, "optimizer.lr=3e-2", plant=plant) == 0
    found = findings(tmp_path / "run")
    assert "nothing left to predict" in " ".join(found["plateau"].evidence)


@BREADTH
def test_a_saturated_start_is_named_by_layer(tmp_path: Path, data: Path) -> None:
    assert runs.train(tmp_path / "run", data, 1, *SMALL, "model.init_method_std=20.0") == 0
    found = findings(tmp_path / "run")
    assert "layer_0" in found["dead-gradients"].evidence[0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that was stopped and resumed."""
    run = tmp_path_factory.mktemp("resumed") / "run"
    assert runs.train(run, data, 1, *SMALL, f"train.exit_interval={RESUMED_AT}") == 75
    assert runs.train(run, data, 1, *SMALL) == 0
    return run


def test_a_resumed_run_is_sound(resumed: Path) -> None:
    assert not findings(resumed)


def test_an_edited_cursor_is_an_anomaly(tmp_path: Path, resumed: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(resumed, run)
    file = runs.checkpoint_path(run, RESUMED_AT) / "state.json"
    state = json.loads(file.read_text())
    state["consumed_samples"] = state["cursor"]["consumed_samples"] = RESUMED_AT * BATCH + 64
    file.write_text(json.dumps(state))
    found = findings(run)
    assert set(found) == {"data-order"} and found["data-order"].step == RESUMED_AT
    assert "contradicts itself" in " ".join(found["data-order"].evidence)


@BREADTH
def test_a_resume_at_another_sample_is_an_anomaly(tmp_path: Path, data: Path) -> None:
    """The second start loses its place: what it had read comes again."""
    run = tmp_path / "run"
    assert runs.train(run, data, 1, *SMALL, f"train.exit_interval={RESUMED_AT}") == 75
    assert runs.train(run, data, 1, *SMALL, plant=lose_place) == 0
    found = findings(run)
    assert "data-order" in found and found["data-order"].step >= RESUMED_AT


def lose_place() -> None:
    """The cursor of a checkpoint is read as that of a run that begins."""
    from megatron_slm.data.cursor import Cursor

    read = Cursor.from_dict
    Cursor.from_dict = staticmethod(  # type: ignore[method-assign]
        lambda stored: Cursor.start(read(stored).order, stored["tokenizer_hash"])
    )


STAGE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.micro_batch_size=8",
    "train.global_batch_size=8",
    "train.eval_interval=20",
    "log.tensorboard=false",
    "optimizer.lr=1e-3",
)
WORDY = """def wordy(answer, fields):
    return min(1.0, len(answer.split()) / 10.0)
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, examples: dict[str, Path]) -> Path:
    """A model that sorts most digits."""
    run = tmp_path_factory.mktemp("tuned") / "sft"
    more = ("train.train_iters=150", "train.global_batch_size=16", "train.micro_batch_size=16", "optimizer.lr=5e-3")
    assert runs.train(run, examples["chat"], 1, *STAGE, "stage=sft", *more) == 0
    return run


def stage(run: Path, examples: Path, parent: Path, *overrides: str) -> dict[str, Finding]:
    """What a run of a later stage has."""
    assert runs.train(run, examples, 1, *STAGE, f"checkpoint.pretrained_checkpoint={parent}", *overrides) == 0
    return findings(run)


def test_a_sound_fine_tuning_has_nothing(tuned: Path) -> None:
    assert not findings(tuned)


def test_dpo_alone_displaces_and_forgets(tmp_path: Path, examples: dict[str, Path], tuned: Path) -> None:
    options = ("stage=dpo", "train.train_iters=60")
    alone = stage(tmp_path / "alone", examples["preference"], tuned, *options)
    assert set(alone) == {"likelihood-displacement", "forgetting"}
    mended = stage(tmp_path / "mended", examples["preference"], tuned, *options, "dpo.dpo_sft_weight=0.2")
    assert not mended


def grpo(rewards: str, *overrides: str) -> tuple[str, ...]:
    """Options of GRPO from ``rewards``."""
    own = ("stage=grpo", "train.train_iters=40", "grpo.grpo_group_size=4", "grpo.grpo_kl_beta=0.01")
    return (*own, "rollout.max_new_tokens=12", "rollout.batch_size=32", f"rollout.rewards={rewards}=1", *overrides)


def test_a_sound_policy_has_nothing(tmp_path: Path, examples: dict[str, Path], tuned: Path) -> None:
    larger = ("grpo.grpo_group_size=8", "train.train_iters=50", "rollout.max_new_tokens=14", "rollout.batch_size=64")
    options = grpo(f"{alignment.__file__}:digits_right", *larger)
    assert not stage(tmp_path / "run", examples["prompt"], tuned, *options)


def test_a_reward_for_words_is_hacked(tmp_path: Path, examples: dict[str, Path], tuned: Path) -> None:
    """It pays for length, and the digits that were right before are lost."""
    (tmp_path / "reward.py").write_text(WORDY)
    watched = (f"rollout.watched={alignment.__file__}:digits_right", "optimizer.lr=2e-3")
    options = grpo(f"{tmp_path / 'reward.py'}:wordy", *watched)
    found = stage(tmp_path / "run", examples["prompt"], tuned, *options)
    assert {"reward-hacking", "length-bias", "zero-variance-groups"} <= set(found)
    assert "digits_right" in found["reward-hacking"].summary


@BREADTH
def test_a_rate_too_high_loses_the_reward(tmp_path: Path, examples: dict[str, Path], tuned: Path) -> None:
    options = grpo(f"{alignment.__file__}:digits_right", "optimizer.lr=3e-2")
    found = stage(tmp_path / "run", examples["prompt"], tuned, *options)
    assert "divergence" in found and "minus the reward" in found["divergence"].summary
