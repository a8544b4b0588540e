"""Our sections -> core's ``TransformerConfig``: the only such mapping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.device import can_free_while_sending
from megatron_slm.train.config import PrecisionConfig, TrainConfig


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, train: TrainConfig, *, device: str
) -> TransformerConfig:
    """Core's configuration of one rank's model. Derived values (head dimension, MLP width) are resolved here once."""
    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    return kind(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=activation(model),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        # Core marks a weight as divided over tp only while it initialises it; the gradient norm counts by that mark.
        # So core "initialises" with nothing and parallel/initialise.py writes the values, independent of the layout.
        perform_initialization=True,
        use_cpu_initialization=False,
        init_method=leave_as_is,
        output_layer_init_method=leave_as_is,
        embedding_init_method=leave_as_is,
        **format_options(precision, device),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size if parallel.vpp_size > 1 else None,
        **context_options(parallel),
        sequence_parallel=parallel.sequence_parallel,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        recompute_modules=list(train.recompute_modules) if train.recompute_granularity == "selective" else None,
        # The loss is a sum over tokens and is divided by their number in the whole global batch, once.
        calculate_per_token_loss=True,
        # Core looks tokens up by indexing then. On CPU ranks that is the way whose gradient has no fixed order, and
        # F.embedding the one that has.
        deterministic_mode=train.deterministic and device == "cuda",
        deallocate_pipeline_outputs=can_free_while_sending(device),
        # Interleaving over two ranks makes the next and the previous rank the same one; batched exchanges then match
        # the wrong pairs (first loss off by 4e-5 without an error). The overlapped exchange uses a second group there.
        overlap_p2p_comm=parallel.vpp_size > 1,
        batch_p2p_comm=parallel.vpp_size == 1,
        # Core's fused GELU is the tanh approximation and wants a bias; SwiGLU is the one whose fusion changes nothing.
        bias_activation_fusion=model.swiglu,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # needs apex's CUDA extension
        persist_layer_norm=False,
        **attention_options(model),
        **prediction_options(model),
        **expert_options(model, parallel, precision),
    )


def format_options(precision: PrecisionConfig, device: str) -> dict[str, Any]:
    """What core has to hear of number formats. CPU ranks read in bf16 what a GPU has trained in FP8."""
    dtype = getattr(torch, precision.params_dtype)
    options = {"params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype, "bf16": precision.bf16}
    if precision.fp8 is None or device != "cuda":
        return options
    fp8 = {"fp8": precision.fp8, "fp8_recipe": precision.fp8_recipe, "fp8_param": precision.fp8_param_gather}
    return options | fp8


def context_options(parallel: ParallelConfig) -> dict[str, Any]:
    """What core has to hear of context parallelism."""
    cp = parallel.context_parallel_size
    return {"context_parallel_size": cp, "cp_comm_type": parallel.cp_comm_type if cp > 1 else None}


def attention_options(model: ModelConfig) -> dict[str, Any]:
    """What core has to hear of the norms of queries and keys, and of multi-latent attention."""
    if not model.multi_latent_attention:
        return {"qk_layernorm": model.qk_layernorm}
    return {
        # Core sums the gradients of every "q_layernorm" over tp by this option. That of a latent is whole already, or
        # marked as sequence-parallel.
        "qk_layernorm": False,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": model.rope_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_scaling_factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings,
        "mscale": model.mscale,
        "mscale_all_dim": model.mscale_all_dim,
    }


def prediction_options(model: ModelConfig) -> dict[str, Any]:
    """What core has to hear of multi-token prediction; nothing without it."""
    if model.mtp_num_layers is None:
        return {}
    return {"mtp_num_layers": model.mtp_num_layers, "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor}


def expert_options(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """What core has to hear of a mixture of experts; nothing of a dense model."""
    if model.num_moe_experts is None:
        return {}
    layers = [int(model.is_moe_layer(layer)) for layer in range(model.num_layers)]
    return {
        "num_moe_experts": model.num_moe_experts,
        # Core stores layers stacked under one name only where a number says that all of them are alike.
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tp_size,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "moe_grouped_gemm": parallel.moe_grouped_gemm,
        "moe_router_dtype": "fp64" if precision.fp64 else "fp32",
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_num_groups": model.moe_router_num_groups,
        "moe_router_group_topk": model.moe_router_group_topk,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        # Core would move the bias while it reduces the gradients, before anyone has judged the step; our router does.
        "moe_router_enable_expert_bias": False,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
        "moe_token_drop_policy": model.moe_token_drop_policy,
    }


def leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    """An initialiser that writes nothing."""
    return weight


def activation(model: ModelConfig) -> Callable[[Any], Any]:
    """The MLP's activation: SiLU for the gated unit, else exact GELU or GPT-2's tanh approximation."""
    if model.swiglu:
        return F.silu
    return gelu_tanh if model.openai_gelu else F.gelu


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's GELU (Hendrycks and Gimpel, arXiv 1606.08415, tanh approximation)."""
    return F.gelu(x, approximate="tanh")
