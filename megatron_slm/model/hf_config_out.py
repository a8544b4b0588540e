"""Our ``model`` section -> a Hugging Face ``config.json`` that transformers 4 and 5 read alike. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.hf_config import LLAMA3_SCALING, MODEL_TYPES

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def choose_model_type(model: ModelConfig, asked: str | None) -> str:
    """The model type that a section is written as: the one asked for, else the first that can express it.

    Raises:
        CheckpointError: names every field that the type, or the nearest one, has no key for.
    """
    if asked not in (None, *MODEL_TYPES):
        raise CheckpointError(f"model type {asked} is none of {', '.join(MODEL_TYPES)}; name one of them")
    order = [asked] if asked is not None else list(MODEL_TYPES)
    reasons = {name: list(_in_the_way(model, name)) for name in order}
    best = min(order, key=lambda name: len(reasons[name]))
    if not reasons[best]:
        return best
    raise CheckpointError(
        f"this model cannot be written as {best}{'' if asked else ', the nearest of ' + ', '.join(MODEL_TYPES)}: "
        f"{'; '.join(reasons[best])}. Train a model with these values, or keep the checkpoint as it is"
    )


def _in_the_way(model: ModelConfig, model_type: str) -> Iterator[str]:
    """Every field whose value the model type has no key for."""
    for field, wanted in {**_common(model), **(_gpt2_fields(model) if model_type == "gpt2" else {})}.items():
        if (value := getattr(model, field)) != wanted:
            yield f"model.{field} is {value}, not {wanted}"
    if model_type == "gpt2":
        return
    fields: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "swiglu": True,
        "openai_gelu": False,
        "qk_layernorm": model_type == "qwen3",
        "num_moe_experts": model.num_moe_experts if model_type == "mixtral" else None,
    }
    if model_type != "llama":
        fields["add_bias_linear"] = False
    if model_type != "llama" or not model.add_bias_linear:
        fields["add_qkv_bias"] = model_type == "qwen2"
    for field, wanted in fields.items():
        if (value := getattr(model, field)) != wanted:
            yield f"model.{field} is {value}, not {wanted}"
    if model_type == "mixtral" and model.num_moe_experts is None:
        yield "model.num_moe_experts is not set"


def _common(model: ModelConfig) -> dict[str, Any]:
    """Fields whose default alone can be written, whatever the type."""
    plain = ModelConfig()
    names = (
        "moe_layer_freq", "moe_first_dense_layers", "moe_router_score_function", "moe_router_pre_softmax",
        "moe_router_num_groups",
        "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size",
        "moe_expert_capacity_factor", "multi_latent_attention", "mtp_num_layers",
    )  # fmt: skip
    wanted = (
        {name: getattr(plain, name) for name in names}
        if model.num_moe_experts is not None
        else {name: getattr(plain, name) for name in ("multi_latent_attention", "mtp_num_layers")}
    )
    # muP divides the output by width over base width, which no Hugging Face key says.
    return wanted | {"mup_base_hidden_size": model.hidden_size if model.mup_base_hidden_size else None}


def _gpt2_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "num_moe_experts": None,
        "num_query_groups": model.num_attention_heads if model.num_query_groups is not None else None,
        "kv_channels": model.hidden_size // model.num_attention_heads if model.kv_channels is not None else None,
    }


def huggingface_config(
    model: ModelConfig, model_type: str, *, vocab_size: int, dtype: str, tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of ``config.json``.

    Args:
        model_type: from :func:`choose_model_type`.
        dtype: torch's name of the format of the weights.
        tokens: ``bos_token_id`` and its like.
    """
    own = _gpt2(model) if model_type == "gpt2" else _decoder(model, model_type)
    return {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": vocab_size,
        # transformers 5 calls it dtype, transformers 4 torch_dtype.
        "dtype": dtype,
        "torch_dtype": dtype,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        **tokens,
        **own,
    }


def _decoder(model: ModelConfig, model_type: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.use_rope_scaling:
        rope = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_SCALING}
    own: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.expert_ffn_size if model_type == "mixtral" else model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.position_limit,
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_dropout": model.attention_dropout,
        "rope_parameters": {**rope, "rope_theta": model.rotary_base},
        # The same for transformers 4.
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.use_rope_scaling else None,
    }
    if model_type == "llama":
        own |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    if model_type == "qwen3":
        own["attention_bias"] = False
    if model_type in ("mistral", "mixtral"):
        own["sliding_window"] = None  # absent, Mistral's would be 4096
    if model_type in ("qwen2", "qwen3"):
        own["use_sliding_window"] = False
    if model_type == "mixtral":
        own |= {"num_local_experts": model.num_moe_experts, "num_experts_per_tok": model.moe_router_topk}
    return own


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "n_positions": model.position_limit,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "layer_norm_epsilon": model.layernorm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
    }
