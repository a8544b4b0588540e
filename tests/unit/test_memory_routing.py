"""What a hot expert may add to a rank's memory."""

from __future__ import annotations

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.ledger import Row
from megatron_slm.memory.routing import HOTTEST, hottest, with_hot_experts
from megatron_slm.plan.memory_estimate import estimate

EXPERTS = ("model.num_layers=2", "model.num_moe_experts=8", "model.moe_ffn_hidden_size=64")
FIRST_DENSE = "model.moe_first_dense_layers=1"


def config(*overrides: str) -> RunConfig:
    return load(None, overrides).config


def row(module: str, kind: str = "activations", layer: str = "layer_1") -> Row:
    return Row(0, 0, 0, layer, module, kind, 100, 95, 105, 0, 1)


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        ((), 1.0),
        (EXPERTS, 1.0),  # one rank has all tokens however they are routed
        ((*EXPERTS, "parallel.expert_model_parallel_size=2"), 2.0),
        ((*EXPERTS, "parallel.expert_model_parallel_size=8"), HOTTEST),
        ((*EXPERTS, "parallel.expert_model_parallel_size=8", "model.moe_expert_capacity_factor=1.25"), 1.25),
    ],
)
def test_how_hot_a_rank_can_be(overrides: tuple[str, ...], factor: float) -> None:
    assert hottest(config(*overrides)) == factor


def test_only_what_tokens_are_sent_to_grows_and_only_at_the_high_end() -> None:
    job = config(*EXPERTS, FIRST_DENSE, "parallel.expert_model_parallel_size=8")
    experts = row("decoder.layers.1.mlp.experts.linear_fc1")
    exchanged = row("decoder.layers.1.mlp", "communication buffers")
    others = [
        row("decoder.layers.1.mlp.router"),
        row("decoder.layers.1.mlp.shared_experts.linear_fc1"),
        row("decoder.layers.1.self_attention"),
        row("decoder.layers.1.mlp.experts.linear_fc1", "weight copies"),
        row("decoder.layers.1.mlp.experts.linear_fc1", "gradients"),
        row("decoder.layers.0.mlp", layer="layer_0"),  # a dense layer
    ]
    found = with_hot_experts([experts, exchanged, *others], job)
    assert found[:2] == [experts._replace(high=210), exchanged._replace(high=210)]
    assert found[2:] == others


def test_a_plan_allows_for_it_at_its_high_end_too() -> None:
    def estimated(*overrides: str) -> tuple[float, float]:
        shape = (
            "model.hidden_size=1024",
            "model.num_attention_heads=8",
            "model.vocab_size=1024",
            "precision.bf16=true",
        )
        found = estimate(config(*EXPERTS, *shape, "parallel.world_size=8", *overrides))
        return found.low, found.high

    spread = estimated("parallel.expert_model_parallel_size=8")
    dropped = estimated("parallel.expert_model_parallel_size=8", "model.moe_expert_capacity_factor=1.0")
    assert spread[0] == dropped[0] and spread[1] > dropped[1], "only the high end knows of a hot expert"
