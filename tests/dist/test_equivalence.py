"""n ranks compute what one rank computes: losses of 20 steps, every gradient, norms and weights, in float64.

What separates two layouts is then only the order of float64 sums: 1e-9 leaves room for that and for nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests.ranks import run_ranks
from tests.training import SMALL, Outcome, Task, train, worst_difference

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}

LLAMA = Task()
GPT2 = Task(
    model=ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=32,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        swiglu=False,
        openai_gelu=True,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
    )
)
QWEN = Task(model=replace(SMALL, add_qkv_bias=True, untie_embeddings_and_output_weights=False, rotary_base=1e6))

LAYOUTS = {
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "dp2": (2, {}),
    "dp2-no-distributed-optimizer": (2, {"use_distributed_optimizer": False}),
    "dp4-overlap": (4, {"overlap_param_gather": True, "ddp_bucket_size": 20000}),
    "tp2-pp2-sp": (4, TP2 | PP2 | SP),
    "tp2-pp2-vpp2-sp": (4, TP2 | VPP2 | SP),
    "tp2-dp2-sp": (4, TP2 | SP),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_like_equals_one_rank(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(LLAMA.on(**degrees), world_size, 1e-9)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "tp2-pp2-sp"])
@pytest.mark.parametrize("family", ["gpt2", "qwen"])
def test_tied_and_biased_models_equal_one_rank(family: str, layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal({"gpt2": GPT2, "qwen": QWEN}[family].on(**degrees), world_size, 1e-9)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_packed_documents_equal_one_rank(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(replace(LLAMA, packed=True, iters=5).on(**degrees), world_size, 1e-9)


RECOMPUTE = {
    "selective": TrainConfig(global_batch_size=4, recompute_granularity="selective"),
    "full-uniform": TrainConfig(
        global_batch_size=4, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
    "full-block": TrainConfig(
        global_batch_size=4, recompute_granularity="full", recompute_method="block", recompute_num_layers=1
    ),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_nothing(recompute: str) -> None:
    task = replace(LLAMA, iters=5)
    found = outcome(replace(task, train=RECOMPUTE[recompute]).on(**TP2, **PP2, **SP), 4)
    expected = one_rank(task)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)
    error, name = worst_difference(found.gradients, expected.gradients)
    assert error <= 1e-9, f"{name} differs by {error:.2e}"


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "dp2", "tp2-pp2-sp"])
def test_z_loss_and_label_smoothing_equal_one_rank(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    objective = TrainConfig(global_batch_size=4, z_loss_coefficient=1e-3, label_smoothing=0.1)
    check_equal(replace(LLAMA, train=objective, iters=5).on(**degrees), world_size, 1e-9)
    assert one_rank(replace(LLAMA, train=objective, iters=5)).losses[-1] != one_rank(replace(LLAMA, iters=5)).losses[-1]


def test_micro_batch_size_changes_nothing() -> None:
    task = replace(LLAMA, iters=5)
    larger = replace(task, train=TrainConfig(micro_batch_size=4, global_batch_size=4))
    found, expected = outcome(larger, 1), one_rank(task)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "dp2", "tp2-pp2-sp"])
def test_fp32_stays_within_its_own_noise(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(replace(LLAMA, precision=PrecisionConfig()).on(**degrees), world_size, 1e-5)


@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "dp2"])
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
