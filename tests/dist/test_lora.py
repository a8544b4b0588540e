"""Adapters beside frozen weights: every layout trains them as one rank does, and nothing else is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ADAPTER_SUFFIX, LoraConfig
from megatron_slm.model.counts import adapter_parameters
from megatron_slm.train.config import OptimizerConfig, TrainConfig
from tests.pool import RankPool
from tests.stage_training import ending_of, micro_batches, train_stage
from tests.training import Outcome, Task, build, finish, worst_difference

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
    adapters = [value for key, value in outcome.weights.items() if ADAPTER_SUFFIX in key]
    assert len(adapters) == 4 * 4 * 2, "four layers of four"
    assert sum(value.numel() for value in adapters) == adapter_parameters(TASK.model, TASK.lora)
    for key, value in outcome.initial.items():
        assert outcome.weights[key].equal(value) != is_trained(key), key
    return outcome


def scored(task: Task, moved: bool) -> tuple[torch.Tensor, ...]:
    """Scores of a batch: with adapters, without, and with them again.

    Args:
        moved: the adapters are no longer zero.
    """
    from megatron_slm.parallel.lora import Adapter, adapters_off
    from megatron_slm.rollout.score import scores

    groups, chunks, _ = build(task, ending_of("dpo", task.precision))
    for module in chunks[0].modules():
        if moved and isinstance(module, Adapter):
            torch.nn.init.constant_(module.lora_b, 0.01)
    batches = micro_batches(task, "dpo", 0, groups)

    def found() -> torch.Tensor:
        return torch.stack(scores(chunks, batches, seq_length=task.model.seq_length, groups=groups))

    on = found()
    with adapters_off(chunks):
        off = found()
    again = found()
    finish()
    return on, off, again


def test_adapters_begin_as_nothing_and_can_be_switched_off(pool: RankPool) -> None:
    task = TASK.on(**TP2, sequence_parallel=True, overlap_param_gather=True)
    base = pool.call(scored, 2, replace(task, lora=LoraConfig()), False)[0][0]
    begun = pool.call(scored, 2, task, False)[0][0]
    on, off, again = pool.call(scored, 2, task, True)[0]
    assert begun.equal(base) and off.equal(base) and again.equal(on)
    assert (on[:, 0] - base[:, 0]).abs().max() > 1e-4


BESIDE: dict[str, tuple[dict[str, Any], LoraConfig, dict[str, Any]]] = {
    "experts": (
        {"num_moe_experts": 4, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
        LoraConfig(lora_rank=4, lora_targets=("linear_qkv", "linear_proj")),
        {"expert_model_parallel_size": 2},
    ),
    "gpt2": (
        {
            "num_query_groups": None,
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
            "swiglu": False,
            "add_bias_linear": True,
            "untie_embeddings_and_output_weights": False,
        },
        LoraConfig(lora_rank=4, lora_rslora=True),
        {**TP2, "sequence_parallel": True},
    ),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_adapters_beside_other_layers(pool: RankPool, kind: str) -> None:
    fields, lora, degrees = BESIDE[kind]
    task = replace(TASK, model=replace(TASK.model, **fields), lora=lora)
    one = pool.call(train_stage, 1, task, "sft", True, 2)[0]
    two = pool.call(train_stage, 2, task.on(**degrees), "sft", True, 2)[0]
    for found, expected in ((two.gradients, one.gradients), (two.weights, one.weights)):
        error, key = worst_difference(trained(found), trained(expected))
        assert error <= TOLERANCE, f"{key}: {error}"
    assert all(two.weights[key].equal(value) for key, value in two.initial.items() if not is_trained(key))


@pytest.mark.parametrize(
    "degrees",
    [
        {**TP2, "sequence_parallel": True},
        {
            "pipeline_model_parallel_size": 4,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ],
    ids=["behind the embedding", "stages without layers"],
)
def test_adapters_are_trained_where_layers_are_recomputed(pool: RankPool, degrees: dict[str, Any]) -> None:
    whole = replace(TASK, model=replace(TASK.model, num_layers=2))
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    task = replace(whole, train=replace(whole.train, **recompute)).on(**degrees)
    ranks = 2 if "sequence_parallel" in degrees else 4
    found, one = pool.call(train_stage, ranks, task, "sft", True, 2)[0], pool.call(train_stage, 1, whole, "sft")[0]
    error, key = worst_difference(trained(found.weights), trained(one.weights))
    assert error <= TOLERANCE, f"{key}: {error}"
    assert not any(value.equal(found.initial[key]) for key, value in trained(found.weights).items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_layout_trains_adapters_as_one_rank(pool: RankPool, name: str, layout: str) -> None:
    world_size, size, degrees = LAYOUTS[layout]
    task = replace(TASK, train=replace(TASK.train, micro_batch_size=size)).on(**degrees)
    found, expected = pool.call(train_stage, world_size, task, name, True, 2)[0], on_one_rank(pool, name)
    assert found.initial.keys() == expected.initial.keys()
    assert all(found.initial[key].equal(value) for key, value in expected.initial.items()), "drawn by global name"
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE, abs=TOLERANCE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6), "core adds up norms in fp32"
    for one, other in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        assert one.keys() == other.keys()
        error, key = worst_difference(trained(one), trained(other))
        assert error <= TOLERANCE, f"{key}: {error}"
    for key, value in found.initial.items():
        assert found.weights[key].equal(value) or is_trained(key), f"{key} was frozen"
