"""Parameter and FLOP counts against published numbers and the definition."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.presets import PRESETS
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.counts import active_parameters, flops_per_token, parameters


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.parameters is not None])
def test_published_parameter_counts(name: str) -> None:
    model = load(None, [f"preset={name}"]).config.model
    assert model.vocab_size is not None
    without_predictions = dataclasses.replace(model, mtp_num_layers=None)
    assert parameters(without_predictions, model.vocab_size) == PRESETS[name].parameters


def test_tiny_is_tiny() -> None:
    assert parameters(load(None, ["preset=tiny"]).config.model, 4096) == 4_000_000


def test_biases_are_counted_one_by_one() -> None:
    plain = ModelConfig(num_layers=3, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=10)
    qkv = (2 + 1 + 1) * 4
    with_qkv = dataclasses.replace(plain, add_qkv_bias=True)
    with_all = dataclasses.replace(plain, add_bias_linear=True)
    assert parameters(with_qkv, 16) - parameters(plain, 16) == 3 * qkv
    assert parameters(with_all, 16) - parameters(plain, 16) == 3 * (qkv + 8 + 2 * 10 + 8)


def test_flops_by_the_definition() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=10, seq_length=6
    )
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10  # query, key and value, projection, gated MLP
    attention_forward = 2 * (2 * 2 * 4 * 6) / 2  # two products of 2 multiply-adds, 2 heads of 4, half of 6 positions
    assert flops_per_token(model, 16) == 3 * (2 * (2 * layer + 16 * 8) + 2 * attention_forward)


def test_the_output_layer_is_counted_tied_or_not() -> None:
    untied = ModelConfig()
    tied = dataclasses.replace(untied, untie_embeddings_and_output_weights=False)
    assert flops_per_token(tied, 512) == flops_per_token(untied, 512)
    assert parameters(untied, 512) - parameters(tied, 512) == 512 * untied.hidden_size


TINY_MOE = ModelConfig(
    num_layers=3,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=10,
    seq_length=6,
    num_moe_experts=4,
    moe_first_dense_layers=1,
    moe_router_topk=2,
    moe_ffn_hidden_size=5,
    moe_shared_expert_intermediate_size=7,
    moe_shared_expert_gate=True,
)


def test_a_token_meets_the_experts_it_is_sent_to() -> None:
    expert = 3 * 8 * 5
    assert parameters(TINY_MOE, 16) - active_parameters(TINY_MOE, 16) == 2 * (4 - 2) * expert
    dense = dataclasses.replace(TINY_MOE, num_moe_experts=None)
    assert active_parameters(dense, 16) == parameters(dense, 16)


def test_flops_of_experts_latents_and_predictions_by_the_definition() -> None:
    model = dataclasses.replace(
        TINY_MOE,
        multi_latent_attention=True,
        q_lora_rank=6,
        kv_lora_rank=4,
        qk_head_dim=3,
        qk_pos_emb_head_dim=2,
        v_head_dim=7,
        mtp_num_layers=2,
    )
    attention = 8 * 6 + 6 * 2 * 5 + 8 * (4 + 2) + 4 * 2 * (3 + 7) + 2 * 7 * 8
    experts = 8 * 4 + 2 * 3 * 8 * 5 + 3 * 8 * 7 + 8  # router, two experts, the shared one, its gate
    dense = 3 * 8 * 10
    matrices = 5 * attention + dense + 4 * experts + 2 * (2 * 8 * 8) + 3 * 16 * 8
    products = 5 * 2 * (2 * (3 + 2) * 6 + 2 * 7 * 6) / 2  # five layers of two heads, half of 6 positions
    assert flops_per_token(model, 16) == 3 * (2 * matrices + products)
