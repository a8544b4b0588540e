"""Packed documents do not see each other on any pipeline stage, and a stage where they do is named before training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests.pool import RankPool
from tests.stage_training import ending_of, micro_batches
from tests.training import SMALL, Task, build, global_tensors

TASK = Task(train=TrainConfig(micro_batch_size=2, global_batch_size=4), packed=True)
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2}),
    "tp2 sp pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "pp2 vpp2": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def probe(task: Task, lost_by: int | None, name: str = "sft", tolerance: float = 0.0) -> tuple[bool, str, bool]:
    """What the probe finds where the pipeline stage ``lost_by`` gets no documents; whether anything has changed."""
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_slm.parallel.isolation import require_isolation

    groups, chunks, _ = build(task, ending_of(name, task.precision))
    for number, chunk in enumerate(chunks):
        if number * groups.pp.size() + groups.pp.rank() == lost_by:
            get_attr_wrapped_model(chunk, "decoder").register_forward_pre_hook(without_documents, with_kwargs=True)
    before, state = global_tensors(chunks), torch.get_rng_state()
    batch = micro_batches(task, name, 0, groups)[0]
    try:
        tried = require_isolation(chunks, batch, seq_length=task.model.seq_length, groups=groups, tolerance=tolerance)
        said = ""
    except ConfigError as error:
        tried, said = True, str(error)
    after = global_tensors(chunks)
    same = all(torch.equal(before[key], after[key]) for key in before) and torch.equal(state, torch.get_rng_state())
    return tried, said, same and all(chunk.training for chunk in chunks)


def without_documents(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    assert named["attention_mask"] is not None, "the plant takes something away"
    return arguments, {**named, "attention_mask": None}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_are_isolated_on_every_stage(pool: RankPool, layout: str) -> None:
    ranks, degrees = LAYOUTS[layout]
    assert pool.call(probe, ranks, TASK.on(**degrees), None) == [(True, "", True)] * ranks


@pytest.mark.parametrize(
    ("layout", "stage", "of"),
    [
        ("one rank", 0, 1),
        ("tp2", 0, 1),
        ("pp2", 0, 2),
        ("pp2", 1, 2),
        ("tp2 sp pp2", 1, 2),
        ("pp2 vpp2", 2, 4),
        ("cp2", 0, 1),
    ],
)
def test_a_stage_that_has_lost_its_documents_is_named(pool: RankPool, layout: str, stage: int, of: int) -> None:
    ranks, degrees = LAYOUTS[layout]
    for tried, said, same in pool.call(probe, ranks, TASK.on(**degrees), stage):
        assert tried and same
        assert f"see each other on pipeline stage {stage} of {of}" in said and "data.pack_rows=false" in said


def test_a_scalar_head_is_probed_like_any_other(pool: RankPool) -> None:
    assert pool.call(probe, 2, TASK.on(**{TP: 2}), None, "reward") == [(True, "", True)] * 2
    assert "pipeline stage 0 of 1" in pool.call(probe, 2, TASK.on(**{TP: 2}), 0, "reward")[0][1]


def test_experts_are_no_leak(pool: RankPool) -> None:
    """Which tokens an expert gets changes the shape of its product, and in fp32 so may the last bits of the others."""
    model = replace(SMALL, num_moe_experts=4, moe_ffn_hidden_size=96)
    for precision in (PrecisionConfig(fp64=True), PrecisionConfig()):
        task = replace(TASK, model=model, precision=precision)
        assert pool.call(probe, 1, task, None, "sft", 1e-4) == [(True, "", True)]
        assert "stage 0 of 1" in pool.call(probe, 1, task, 0, "sft", 1e-4)[0][1]
