"""Random configurations of odd shapes and layouts: most break a rule, one in six breaks none."""

from __future__ import annotations

import random
from typing import Any

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError


def valid_configs(seed: int, count: int, largest: dict[str, int] | None = None) -> list[RunConfig]:
    """So many configurations that break no rule.

    Args:
        largest: degree of an axis ("tp", "pp", "cp", "dp", "ep") -> the most it may be.
    """
    draw, found = random.Random(seed), []
    while len(found) < count:
        try:
            config = load(None, overrides(draw, largest or {})).config
        except ConfigError:
            continue
        if not violations(config):
            found.append(config)
    return found


def overrides(draw: random.Random, largest: dict[str, int]) -> list[str]:
    """One draw, as it would be typed."""
    tp, pp, cp, dp, ep = (
        draw.choice([size for size in sizes if size <= largest.get(axis, size)])
        for axis, sizes in {
            "tp": (1, 1, 2, 3, 4, 5, 6, 8),
            "pp": (1, 1, 2, 3, 5, 8, 16),
            "cp": (1, 1, 2, 3, 4, 8),
            "dp": (1, 1, 2, 3, 4),
            "ep": (1, 2, 3, 4, 8),
        }.items()
    )
    values = {
        **_attention(draw, tp),
        **_sizes(draw, tp, pp, cp),
        **_layout(draw, tp, pp, cp, dp),
        **(_experts(draw, tp, ep) if draw.random() < 0.5 else {}),
    }
    if draw.random() < 0.2:
        values |= _latent(draw)
        values.pop("model.kv_channels", None)
        values.pop("model.num_query_groups", None)
    return [f"{key}={value}" for key, value in values.items()]


def _attention(draw: random.Random, tp: int) -> dict[str, Any]:
    groups = draw.choice((1, tp, 2 * tp, 3 * tp, 2, 3))
    heads = groups * draw.choice((1, 1, 2, 3, 4, 7))
    heads *= tp if heads % tp else 1
    found = {
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.hidden_size": heads * draw.choice((8, 16, 32, 64, 128, 80, 96)),
    }
    return found | _some(
        draw,
        {
            "model.kv_channels": (8, 16, 64, 128),
            "model.position_embedding_type": ("learned_absolute", "none"),
            "model.rotary_percent": (0.25, 0.5),
            "model.qk_layernorm": ("true",),
        },
    )


def _sizes(draw: random.Random, tp: int, pp: int, cp: int) -> dict[str, Any]:
    found = {
        "model.num_layers": pp * draw.choice((1, 2, 3, 4, 6)),
        "model.seq_length": 2 * cp * tp * draw.choice((1, 4, 5, 32, 128)),
        "model.make_vocab_size_divisible_by": draw.choice((tp, 8 * tp)),
        "model.ffn_hidden_size": tp * draw.choice((16, 17, 100, 344)),
    }
    return found | _some(
        draw,
        {
            "model.vocab_size": (100, 257, 512, 1000, 50257),
            "model.untie_embeddings_and_output_weights": ("false",),
            "model.add_bias_linear": ("true",),
            "model.swiglu": ("false",),
            "model.mup_base_hidden_size": (64, 128),
            "model.mtp_num_layers": (1, 2, 3),
        },
    )


def _layout(draw: random.Random, tp: int, pp: int, cp: int, dp: int) -> dict[str, Any]:
    micro = draw.choice((1, 1, 2, 3))
    found: dict[str, Any] = {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "parallel.context_parallel_size": cp,
        "parallel.world_size": tp * pp * cp * dp,
        "parallel.use_distributed_optimizer": draw.choice(("true", "true", "false")),
        "train.micro_batch_size": micro,
        "train.global_batch_size": micro * dp * pp * draw.choice((1, 2, 3, 4)),
        "train.train_iters": draw.choice((3, 20, 1000)),
        "precision.bf16": draw.choice(("true", "false")),
    }
    if tp > 1:
        found["parallel.sequence_parallel"] = draw.choice(("true", "false"))
    if cp > 1:
        found["parallel.cp_comm_type"] = draw.choice(("p2p", "all_gather"))
    if pp > 1:
        found |= _some(
            draw,
            {
                "parallel.virtual_pipeline_model_parallel_size": (2, 3),
                "parallel.account_for_embedding_in_pipeline_split": ("true",),
                "parallel.account_for_loss_in_pipeline_split": ("true",),
            },
        )
    recomputed: tuple[dict[str, Any], ...] = (
        {},
        {},
        {"train.recompute_granularity": "selective"},
        {"train.recompute_granularity": "selective", "train.recompute_modules": "[mlp]"},
        *(
            {
                "train.recompute_granularity": "full",
                "train.recompute_method": method,
                "train.recompute_num_layers": draw.choice((1, 2, 3)),
            }
            for method in ("uniform", "block")
        ),
    )
    return found | draw.choice(recomputed)


def _experts(draw: random.Random, tp: int, ep: int) -> dict[str, Any]:
    experts = ep * draw.choice((1, 2, 3, 4))
    found = {
        "model.num_moe_experts": experts,
        "model.moe_router_topk": min(experts, draw.choice((1, 2, 3, 8))),
        "model.moe_router_load_balancing_type": draw.choice(("none", "aux_loss", "seq_aux_loss")),
        "parallel.expert_model_parallel_size": ep,
    }
    if found["model.moe_router_load_balancing_type"] != "none":
        found["model.moe_aux_loss_coeff"] = 0.01
    return found | _some(
        draw,
        {
            "parallel.expert_tensor_parallel_size": (1, tp, 2),
            "parallel.moe_token_dispatcher_type": ("allgather",),
            "model.moe_layer_freq": (2, 3),
            "model.moe_first_dense_layers": (1, 2, 3),
            "model.moe_ffn_hidden_size": (16 * tp, 100 * tp),
            "model.moe_shared_expert_intermediate_size": (16 * tp, 100 * tp),
            "model.moe_expert_capacity_factor": (1.0, 1.25, 0.5),
            "model.moe_router_score_function": ("sigmoid",),
            "model.moe_router_pre_softmax": ("true",),
        },
    )


def _latent(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"model.multi_latent_attention": "true", "model.num_query_groups": "null"}
    sizes = (8, 16, 24, 64)
    return found | _some(
        draw,
        {
            "model.q_lora_rank": (16, 64, 100),
            "model.kv_lora_rank": sizes,
            "model.qk_head_dim": sizes,
            "model.qk_pos_emb_head_dim": sizes,
            "model.v_head_dim": sizes,
            "model.rope_type": ("yarn",),
        },
    )


def _some(draw: random.Random, values: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """About a third of the keys, each with one of its values."""
    return {key: draw.choice(choices) for key, choices in values.items() if draw.random() < 0.3}
