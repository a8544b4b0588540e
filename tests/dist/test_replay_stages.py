"""A step of a stage after pretraining, made again from its run alone: its examples and its reference are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_slm.errors import ReplayError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.kept import with_inputs
from megatron_slm.replay.step import configuration, replay_step
from tests import alignment, runs

SHAPE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.train_iters=3",
    "train.eval_iters=0",
    "checkpoint.save_interval=2",
    "replay.level=light",
    "replay.keep_batches=2",
)


def test_a_step_of_dpo_is_made_again_from_the_batches_that_were_kept(tmp_path: Path) -> None:
    data = alignment.compiled(tmp_path, rows=40)
    base, run = tmp_path / "base", tmp_path / "dpo"
    assert runs.train(base, data["chat"], 1, *SHAPE, "stage=sft") == 0
    assert runs.train(run, data["preference"], 1, *SHAPE, "stage=dpo", f"checkpoint.pretrained_checkpoint={base}") == 0
    recording = Capsule.of(run)
    resolved = configuration(recording, 3, tmp_path / "config.json")
    assert with_inputs(resolved, recording, [3])[1] == "from its examples"
    shutil.rmtree(data["preference"])
    shutil.rmtree(base)
    (run / "reference_train.npz").unlink()
    found = replay_step(recording, 3, runs.start)
    assert found.equal and found.inputs == "from the batches that were kept", found.render()


def test_steps_that_draw_are_not_made_from_kept_batches(tmp_path: Path) -> None:
    data = alignment.compiled(tmp_path, rows=40)
    run = tmp_path / "grpo"
    options = ("stage=grpo", "rollout.max_new_tokens=4", "rollout.rewards=exact_match=1", "grpo.grpo_group_size=2")
    assert runs.train(run, data["prompt"], 1, *SHAPE, *options, "train.train_iters=2") == 0
    recording = Capsule.of(run)
    resolved = configuration(recording, 2, tmp_path / "config.json")
    with pytest.raises(ReplayError, match="stage grpo, whose steps train on answers"):
        with_inputs(resolved, recording, [2], kept=True)
    assert with_inputs(resolved, recording, [2])[1] == "from its examples"
