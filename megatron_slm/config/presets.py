"""Model shapes by the names people know. A preset says what the weights mean, never how the job is divided.

The numbers are those of each model's published ``config.json``; ``model.seq_length`` is the length it was first
pretrained at, ``model.max_position_embeddings`` the length its positions are defined for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published shape."""

    origin: str
    """Where the numbers are published: a Hugging Face repository, or ``megatron-slm`` for our own."""
    parameters: int | None
    """Published number without layers of multi-token prediction, ``None`` where it depends on the tokenizer."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""


def _preset(origin: str, parameters: int | None, model: Mapping[str, Any], **other: Any) -> Preset:
    """A preset from its model section; other keys are written ``section__field``."""
    values = {f"model.{name}": value for name, value in model.items()}
    values |= {name.replace("__", "."): value for name, value in other.items()}
    return Preset(origin, parameters, MappingProxyType(values))


_LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
}
"""What Llama and the models of its family have in common."""

_LLAMA3 = _LLAMA | {
    "num_query_groups": 8,
    "vocab_size": 128256,
    "seq_length": 8192,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
    "untie_embeddings_and_output_weights": True,
}

_QWEN25 = _LLAMA | {
    "seq_length": 4096,
    "rotary_base": 1000000.0,
    "layernorm_epsilon": 1e-6,
    "add_qkv_bias": True,
}

_SMOLLM2 = _LLAMA | {
    "vocab_size": 49152,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "rotary_base": 100000.0,
    "untie_embeddings_and_output_weights": False,
}


_DEEPSEEK_V3 = _LLAMA | {
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "num_query_groups": 128,
    "vocab_size": 129280,
    "seq_length": 4096,
    "max_position_embeddings": 163840,
    "layernorm_epsilon": 1e-6,
    "untie_embeddings_and_output_weights": True,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": "yarn",
    "rotary_base": 10000.0,
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "num_moe_experts": 256,
    "moe_first_dense_layers": 3,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_topk": 8,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.3,
}
"""The weight of the prediction is that of the first 10T tokens, 0.1 afterwards (arXiv 2412.19437, section 4.2)."""


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, int]:
    """The five sizes in which the members of a family differ."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "llama3-8b": _preset("meta-llama/Meta-Llama-3-8B", 8_030_261_248, _LLAMA3 | _shape(32, 4096, 14336, 32, 8)),
        "llama3-70b": _preset("meta-llama/Meta-Llama-3-70B", 70_553_706_496, _LLAMA3 | _shape(80, 8192, 28672, 64, 8)),
        # The 405B exists as Llama 3.1 only. Its 126 layers were chosen so that the embedding and the output layer
        # take the place of one layer each: 128 divide over 16 pipeline stages (arXiv 2407.21783, section 3.3.2).
        "llama3-405b": _preset(
            "meta-llama/Llama-3.1-405B",
            405_853_388_800,
            _LLAMA3
            | _shape(126, 16384, 53248, 128, 8)
            | {"max_position_embeddings": 131072, "use_rope_scaling": True, "rope_scaling_factor": 8.0},
            parallel__account_for_embedding_in_pipeline_split=True,
            parallel__account_for_loss_in_pipeline_split=True,
        ),
        "qwen2.5-0.5b": _preset(
            "Qwen/Qwen2.5-0.5B",
            494_032_768,
            _QWEN25
            | _shape(24, 896, 4864, 14, 2)
            | {"vocab_size": 151936, "max_position_embeddings": 32768, "untie_embeddings_and_output_weights": False},
        ),
        "qwen2.5-7b": _preset(
            "Qwen/Qwen2.5-7B",
            7_615_616_512,
            _QWEN25
            | _shape(28, 3584, 18944, 28, 4)
            | {"vocab_size": 152064, "max_position_embeddings": 131072, "untie_embeddings_and_output_weights": True},
        ),
        "qwen3-0.6b": _preset(
            "Qwen/Qwen3-0.6B-Base",
            596_049_920,
            _QWEN25
            | _shape(28, 1024, 3072, 16, 8)
            | {
                "kv_channels": 128,
                "add_qkv_bias": False,
                "qk_layernorm": True,
                "vocab_size": 151936,
                "max_position_embeddings": 32768,
                "untie_embeddings_and_output_weights": False,
            },
        ),
        "smollm2-135m": _preset(
            "HuggingFaceTB/SmolLM2-135M",
            134_515_008,
            _SMOLLM2 | _shape(30, 576, 1536, 9, 3) | {"init_method_std": 1 / 24},
        ),
        "smollm2-360m": _preset("HuggingFaceTB/SmolLM2-360M", 361_821_120, _SMOLLM2 | _shape(32, 960, 2560, 15, 5)),
        "smollm2-1.7b": _preset(
            "HuggingFaceTB/SmolLM2-1.7B",
            1_711_376_384,
            _SMOLLM2 | _shape(24, 2048, 8192, 32, 32) | {"rotary_base": 130000.0},
        ),
        "mixtral-8x7b": _preset(
            "mistralai/Mixtral-8x7B-v0.1",
            46_702_792_704,
            _LLAMA
            | _shape(32, 4096, 14336, 32, 8)
            | {
                "vocab_size": 32000,
                "seq_length": 32768,
                "max_position_embeddings": 32768,
                "rotary_base": 1000000.0,
                "untie_embeddings_and_output_weights": True,
                "num_moe_experts": 8,
                "moe_router_topk": 2,
                "moe_router_load_balancing_type": "aux_loss",
                "moe_aux_loss_coeff": 0.02,
            },
        ),
        "gpt2": _preset(
            "openai-community/gpt2",
            124_439_808,
            _shape(12, 768, 3072, 12, 12)
            | {
                "vocab_size": 50257,
                "seq_length": 1024,
                "max_position_embeddings": 1024,
                "position_embedding_type": "learned_absolute",
                "normalization": "LayerNorm",
                "layernorm_epsilon": 1e-5,
                "swiglu": False,
                "openai_gelu": True,
                "add_bias_linear": True,
                "add_qkv_bias": True,
                "untie_embeddings_and_output_weights": False,
                "attention_dropout": 0.1,
                "hidden_dropout": 0.1,
                "init_method_std": 0.02,
            },
        ),
        "gpt3-175b": _preset(
            "arXiv 2005.14165, table 2.1",
            None,
            _shape(96, 12288, 49152, 96, 96)
            | {
                "vocab_size": 50257,
                "seq_length": 2048,
                "max_position_embeddings": 2048,
                "position_embedding_type": "learned_absolute",
                "normalization": "LayerNorm",
                "layernorm_epsilon": 1e-5,
                "swiglu": False,
                "openai_gelu": True,
                "add_bias_linear": True,
                "add_qkv_bias": True,
                "untie_embeddings_and_output_weights": False,
                "attention_dropout": 0.1,
                "hidden_dropout": 0.1,
                "init_method_std": 0.02,
            },
        ),
        "deepseek-v3": _preset("deepseek-ai/DeepSeek-V3", 671_026_419_200, _DEEPSEEK_V3),
        "tiny": _preset(
            "megatron-slm",
            None,
            _LLAMA
            | _shape(4, 256, 704, 8, 4)
            | {"seq_length": 256, "max_position_embeddings": 256, "untie_embeddings_and_output_weights": False},
            optimizer__lr=1e-3,
        ),
    }
)
"""Preset id -> preset."""
