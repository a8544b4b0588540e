"""Every stage's losses under other layouts, micro-batch sizes and packing, against one rank, in float64.

What is logged, the gradients of the first step and the weights after three agree to the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_slm.train.config import OptimizerConfig, TrainConfig
from tests.breadth import BREADTH
from tests.pool import RankPool
from tests.stage_training import CONFIGS, train_stage
from tests.training import Outcome, Task, worst_difference

# Without clipping: core's norm is fp32, and so would be the factor that every gradient is multiplied by.
TASK = Task(
    iters=3,
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0),
    packed=True,
)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp2 pp2 sp": (
        4,
        2,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2 dp2": (4, 4, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
}
"""Ranks, micro-batch size and degrees. ``tests/bench/stage_matrix.py`` takes every combination."""

BY_SEQUENCE = ("sft", "reward", "dpo", "grpo gspo")
"""Of each kind of denominator one."""

TOLERANCE = 1e-9
ROTARY_TOLERANCE = 1e-8
"""Of the first gradients: 1.7e-9 was the worst that the fp32 tables have made."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@cache
def on_one_rank(pool: RankPool, name: str) -> Outcome:
    outcome: Outcome = pool.call(train_stage, 1, TASK, name)[0]
    assert all(outcome.weights[key].ne(value).any() for key, value in outcome.initial.items()), "everything is trained"
    return outcome


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """What is not the same number, in words."""
    told = []
    if found.losses != pytest.approx(expected.losses, rel=TOLERANCE, abs=TOLERANCE):
        told.append(f"logged {found.losses} and {expected.losses}")
    if found.grad_norms != pytest.approx(expected.grad_norms, rel=1e-6):  # core adds up norms in fp32
        told.append(f"norms {found.grad_norms} and {expected.grad_norms}")
    for one, other in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        error, name = worst_difference(one, other)
        if not error <= TOLERANCE:
            told.append(f"{name}: {error}")
    return told


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "tp2 pp2 sp") for name in CONFIGS),
        *(pytest.param(name, "cp2 dp2", marks=() if name == "dpo" else BREADTH) for name in BY_SEQUENCE),
    ],
)
def test_a_layout_gives_the_numbers_of_one_rank(pool: RankPool, name: str, layout: str) -> None:
    world_size, size, degrees = LAYOUTS[layout]
    task = replace(TASK, train=replace(TASK.train, micro_batch_size=size)).on(**degrees)
    found: Outcome = pool.call(train_stage, world_size, task, name)[0]
    assert differences(found, on_one_rank(pool, name)) == []


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_unpacked_is_packed(pool: RankPool, name: str) -> None:
    """With learned positions, which every document counts from 0: nothing else may differ."""
    task = replace(TASK, model=replace(TASK.model, position_embedding_type="learned_absolute"))
    packed, found = (pool.call(train_stage, 1, task, name, whole)[0] for whole in (True, False))
    assert differences(found, packed) == []


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_unpacked_is_packed_but_for_the_rounding_of_rotary_tables(pool: RankPool, name: str) -> None:
    """A document further back in its row is rotated further: core's tables are fp32, whatever the model is."""
    found: Outcome = pool.call(train_stage, 1, TASK, name, False)[0]
    packed = on_one_rank(pool, name)
    steps = len(packed.losses) // TASK.iters
    assert found.losses[:steps] == pytest.approx(packed.losses[:steps], rel=TOLERANCE, abs=TOLERANCE)
    error, where = worst_difference(found.gradients, packed.gradients)
    assert error <= ROTARY_TOLERANCE, f"{where}: {error}"
