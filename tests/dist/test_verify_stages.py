"""``mslm verify`` of the stages after pretraining: what each loss reads is made up, and a fault is found there too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm.stages import made_up  # noqa: E402
from tests.dist.test_verify import norms_not_summed_over_tp, run  # noqa: E402
from tests.verification import verified  # noqa: E402

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def small(stage: str) -> RunConfig:
    config = run(2, **SP)
    return replace(config, stage=stage, model=replace(config.model, num_layers=2))


@pytest.mark.parametrize("stage", ["reward", "distill"])
def test_a_stage_on_two_ranks_is_what_it_is_on_one(stage: str) -> None:
    report = verified([small(stage)])
    assert report.equal, report.render()
    names = {row.name for row in report.runs[0].rows}
    assert {"loss of step 1", "step 2 again from the checkpoint"} <= names
    assert any("the teacher is not run" in note for note in report.notes) == (stage == "distill")


def test_a_fault_in_the_policys_update_is_found() -> None:
    report = verified([small("ppo")], norms_not_summed_over_tp)
    assert not report.equal
    assert any("critic are not run" in note for note in report.notes)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "grpo", "distill"])
def test_rows_are_a_function_of_their_generator_alone(stage: str) -> None:
    config = small(stage)
    whole = made_up.micro_batch(config, [np.random.default_rng(number) for number in (1, 2)], 300)
    second = made_up.micro_batch(config, [np.random.default_rng(2)], 300)
    assert set(made_up.fields_of(config)) <= set(whole)
    for name in set(whole) - {"segments"}:
        assert whole[name][1].equal(second[name][0]), name
    assert (whole["segments"].unique() >= 0).sum() % 2 == 0, "whole pairs"
    masked = made_up.micro_batch(config, [np.random.default_rng(1)], 300, masked=True)
    assert not masked["loss_mask"].any() and (masked["segments"] == -1).all()
