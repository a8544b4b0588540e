"""``mslm verify``: jobs that are right pass, planted faults are found, and the module and the axis are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.config import DataConfig
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests.verification import command, verified

SMALL = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=32, vocab_size=300
)
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


def run(world_size: int, model: ModelConfig = SMALL, **parallel: Any) -> RunConfig:
    return RunConfig(
        name="small",
        model=model,
        parallel=ParallelConfig(device="cpu", world_size=world_size, **parallel),
        train=TrainConfig(global_batch_size=8),
    )


# Faults: each is planted into the ranks of the parallel job alone, before its model is built.


def norms_not_summed_over_tp() -> None:
    """Under sequence parallelism each tp rank has seen its own tokens' part of a norm's gradient."""
    import sys

    module: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
    module._allreduce_non_tensor_model_parallel_grads = lambda *args, **kwargs: None


def rotated_by_one() -> None:
    """Odd ranks take every token for the one after it."""
    import torch.distributed as dist
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    original = RotaryEmbedding.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, "offset": dist.get_rank() % 2})

    RotaryEmbedding.forward = forward


def update_of_one_rank_twice_as_large() -> None:
    import torch.distributed as dist

    from megatron_slm.train import step

    original = step.set_learning_rate

    def faster(optimizer: Any, learning_rate: float, peak: float) -> None:
        original(optimizer, learning_rate * (1 + dist.get_rank() % 2), peak)

    step.set_learning_rate = faster


def moments_not_loaded() -> None:
    from megatron_slm.train import checkpoint

    checkpoint.load_optimizer_state = lambda *args, **kwargs: None


def a_rank_that_dies() -> None:
    from megatron_slm.train import step

    def gradient_norm(optimizer: Any) -> float:
        raise RuntimeError("this rank is tired")

    step.gradient_norm = gradient_norm


def test_dense_layouts_equal_one_rank() -> None:
    tied = replace(SMALL, untie_embeddings_and_output_weights=False)
    packed = DataConfig(reset_attention_mask=True, reset_position_ids=True)
    bf16 = PrecisionConfig(bf16=True)
    selective = TrainConfig(global_batch_size=8, recompute_granularity="selective")
    report = verified(
        [
            replace(run(4, **TP2, **PP2, **SP), data=packed),
            replace(run(2, tied, **VPP2), precision=bf16),
            replace(run(4, tied, **TP2, overlap_param_gather=True, **SP), train=selective),
        ]
    )
    assert report.equal, report.render(verbose=True)
    rows = {(row.precision, row.name): row for row in report.runs[0].rows}
    assert len(rows) == len(report.runs[0].rows) == 24
    exact = rows["fp64", "gradients of step 1"]
    assert 0.0 < exact.error < 1e-13, "float64 leaves nothing but rounding, and rounding there is"
    assert rows["fp32", "step 2 again from the checkpoint"].tolerance == 0.0


FAULTS = {
    "rope": (
        rotated_by_one,
        run(4, **TP2, **PP2),
        "decoder.layers.0.self_attention.core_attention",
        "forward",
        "tp",
    ),
    "update": (update_of_one_rank_twice_as_large, run(2, **PP2), None, "update", "pp"),
    "resume": (moments_not_loaded, run(2), "checkpoint", "resume", "none: one rank alone differs too"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault: str) -> None:
    plant, config, module, direction, axis = FAULTS[fault]
    report = verified([config], plant)
    (found,) = report.runs
    assert not report.equal
    assert found.direction == direction, report.render()
    assert module is None or found.first_module == module
    assert found.axis == axis
    assert f"first module that differs: {found.first_module} ({direction})" in report.render()


def test_ranks_that_die_are_a_difference() -> None:
    report = verified([run(2, **TP2)], a_rank_that_dies)
    (row,) = report.runs[0].rows
    assert not row.equal and "this rank is tired" in row.detail
    assert report.runs[0].first_module is None


SMALL_COMMAND = ("--preset", "tiny", "model.seq_length=64", "parallel.tensor_model_parallel_size=4", "--ranks=2")


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    passed = command(*SMALL_COMMAND, "--json", str(file))
    assert passed.code == 0, passed.out + passed.err
    assert "claims hold" in passed.out and "parallel.tensor_model_parallel_size" in passed.out
    written = json.loads(file.read_text())
    assert written["equal"] and all(row["equal"] for one in written["runs"] for row in one["rows"])

    failed = command(*SMALL_COMMAND, "parallel.sequence_parallel=true", plant=norms_not_summed_over_tp)
    assert failed.code == 1
    assert "first module that differs: decoder.final_layernorm (gradient)" in failed.out
    assert "axis: tp+sp" in failed.out


def test_the_command_refuses_what_check_refuses() -> None:
    refused = command("--preset", "tiny", "parallel.tensor_model_parallel_size=3")
    assert refused.code == 2
    assert "tensor_model_parallel_size" in refused.err and not refused.out
