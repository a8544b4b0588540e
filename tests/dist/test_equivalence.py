"""n ranks train like one rank over many steps and in every precision, and the same job twice gives the same bits.

What separates two layouts in float64 is only the order of sums: 1e-9 leaves room for that and for nothing else. Which
combinations of axes, models and schedules are equal over a few steps is the question of ``test_matrix.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests.breadth import widely
from tests.ranks import run_ranks
from tests.training import Outcome, Task, train, worst_difference

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}

LLAMA = Task()
LAYOUTS = {
    "tp2-sp": (2, TP2 | SP),
    "pp2-vpp2": (2, VPP2),
    "dp2": (2, {}),
    "dp4-overlap": (4, {"overlap_param_gather": True, "ddp_bucket_size": 20000}),
    "tp2-pp2-sp": (4, TP2 | PP2 | SP),
    "tp2-pp2-vpp2-sp": (4, TP2 | VPP2 | SP),
}


def outcome(task: Task, world_size: int) -> Outcome:
    """The whole job's outcome, told by rank 0."""
    result: Outcome = run_ranks(train, world_size, task)[0]
    return result


@cache
def one_rank(task: Task) -> Outcome:
    """The reference run of a task."""
    return outcome(replace(task, parallel=ParallelConfig()), 1)


def check_equal(task: Task, world_size: int, tolerance: float) -> None:
    """The job equals one rank within ``tolerance``, relative."""
    found, expected = outcome(task, world_size), one_rank(replace(task, parallel=ParallelConfig()))
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    # Core takes the norm in fp32, whatever the gradients are.
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=max(tolerance, 1e-6), abs=0)
    for what, bound in (("initial", 0.0), ("gradients", tolerance)):
        error, name = worst_difference(getattr(found, what), getattr(expected, what))
        assert error <= bound, f"{what}: {name} differs by {error:.2e} of its norm"
    assert expected.losses[0] != expected.losses[-1], "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("layout", ["dp4-overlap", "tp2-pp2-vpp2-sp"])
def test_twenty_steps_equal_one_rank(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(LLAMA.on(**degrees), world_size, 1e-9)


def test_micro_batch_size_changes_nothing() -> None:
    task = replace(LLAMA, iters=5)
    larger = replace(task, train=TrainConfig(micro_batch_size=4, global_batch_size=4))
    found, expected = outcome(larger, 1), one_rank(task)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)


@pytest.mark.parametrize("layout", widely(["tp2-sp", "pp2-vpp2", "dp2", "tp2-pp2-sp"], "tp2-pp2-sp", "dp2"))
def test_fp32_stays_within_its_own_noise(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(replace(LLAMA, precision=PrecisionConfig()).on(**degrees), world_size, 1e-5)


@pytest.mark.parametrize("layout", widely(["tp2-pp2-sp", "dp2"], "tp2-pp2-sp"))
def test_bf16_trains_like_one_rank(layout: str) -> None:
    """bf16 rounds activations at 2^-8; twenty losses of a small model agree to about a tenth of that."""
    world_size, degrees = LAYOUTS[layout]
    task = replace(LLAMA, precision=PrecisionConfig(bf16=True))
    found, expected = outcome(task.on(**degrees), world_size), one_rank(task)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3, abs=0)


def test_two_runs_of_one_layout_are_bitwise_equal() -> None:
    task = replace(LLAMA, precision=PrecisionConfig(bf16=True)).on(**TP2, **PP2, **SP)
    first, second = outcome(task, 4), outcome(task, 4)
    assert first.losses == second.losses
    assert all(first.weights[name].equal(second.weights[name]) for name in first.weights)


def test_bucket_layout_does_not_change_a_bit_with_fp32_accumulation() -> None:
    """Four data-parallel ranks: with two, a + b commutes and the test would prove nothing."""
    base = replace(LLAMA, precision=PrecisionConfig(), iters=2)
    runs = [
        outcome(base.on(reduce_scatter_with_fp32_accumulation=True, ddp_bucket_size=size), 4)
        for size in (1, 30000, None)
    ]
    native = [outcome(base.on(ddp_bucket_size=size), 4) for size in (1, None)]
    for other in runs[1:]:
        assert all(runs[0].gradients[name].equal(other.gradients[name]) for name in other.gradients)
    changed = any(not native[0].gradients[name].equal(native[1].gradients[name]) for name in native[0].gradients)
    assert changed, "the native reduction did not depend on the buckets either: the comparison above proves nothing"
