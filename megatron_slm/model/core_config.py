"""Our sections -> core's ``TransformerConfig``: the only such mapping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.device import can_free_while_sending
from megatron_slm.train.config import PrecisionConfig, TrainConfig


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, train: TrainConfig, *, device: str
) -> TransformerConfig:
    """Core's configuration of one rank's model. Derived values (head dimension, MLP width) are resolved here once."""
    dtype = getattr(torch, precision.params_dtype)
    return TransformerConfig(
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=precision.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size if parallel.vpp_size > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        recompute_modules=list(train.recompute_modules) if train.recompute_granularity == "selective" else None,
        # The loss is a sum over tokens and is divided by their number in the whole global batch, once.
        calculate_per_token_loss=True,
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
    )


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
