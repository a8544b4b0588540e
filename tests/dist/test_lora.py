"""Adapters beside frozen weights: every layout trains them as one rank does, and nothing else is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ADAPTER_SUFFIX, LoraConfig
from megatron_slm.train.config import OptimizerConfig, TrainConfig
from tests.pool import RankPool
from tests.stage_training import train_stage
from tests.training import Outcome, Task, worst_difference

# Without clipping: core's norm is fp32, and so would be the factor that every gradient is multiplied by.
TASK = Task(
    iters=3,
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
    packed=True,
    lora=LoraConfig(lora_rank=4),
)
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp2": (2, 2, TP2),
    "tp2 pp2 sp": (4, 2, {**TP2, **PP2, "sequence_parallel": True}),
    "pp2 vpp2 dp2": (
        4,
        2,
        {
            **PP2,
            "virtual_pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "cp2 dp2": (4, 4, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
}
"""Ranks, micro-batch size and degrees."""

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def is_trained(name: str) -> bool:
    return ADAPTER_SUFFIX in name or name.startswith("value_head")


def trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if is_trained(name)}


@cache
def on_one_rank(pool: RankPool, name: str) -> Outcome:
    outcome: Outcome = pool.call(train_stage, 1, TASK, name, True, 2)[0]
    assert len([key for key in outcome.weights if ADAPTER_SUFFIX in key]) == 4 * 4 * 2, "four layers of four"
    for key, value in outcome.initial.items():
        assert outcome.weights[key].equal(value) != is_trained(key), key
    return outcome


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_layout_trains_adapters_as_one_rank(pool: RankPool, name: str, layout: str) -> None:
    world_size, size, degrees = LAYOUTS[layout]
    task = replace(TASK, train=replace(TASK.train, micro_batch_size=size)).on(**degrees)
    found, expected = pool.call(train_stage, world_size, task, name, True, 2)[0], on_one_rank(pool, name)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE, abs=TOLERANCE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6), "core adds up norms in fp32"
    for one, other in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        assert one.keys() == other.keys()
        error, key = worst_difference(trained(one), trained(other))
        assert error <= TOLERANCE, f"{key}: {error}"
    for key, value in found.initial.items():
        assert found.weights[key].equal(value) or is_trained(key), f"{key} was frozen"
