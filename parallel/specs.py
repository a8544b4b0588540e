"""Which modules a transformer layer is made of: Transformer Engine's where it can be imported, else ours or apex's."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_slm.errors import ConfigError
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel import apex
from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.experts import with_experts
from megatron_slm.parallel.latent import LATENT_NORM_KEYS, latent_attention, with_whole_latents
from megatron_slm.parallel.norm import ApexNorm, Norm

ATTENTION_NORM_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def choose_spec(device: str, model: ModelConfig, *, packed_documents: bool) -> tuple[ModuleSpec, Any, str]:
    """The layer's spec, the final norm's class, and one sentence that says which and why.

    Args:
        device: "cuda" or "cpu".
        packed_documents: tokens attend to their own document only; our attention reads the documents in both specs.

    Raises:
        ConfigError: latent attention on a GPU without Transformer Engine.
    """
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        spec, norm = transformer_engine_spec(model, packed_documents)
        attention = "our SDPA attention, which reads packed documents" if packed_documents else "TE's attention"
        return (
            spec,
            norm,
            f"layers: Transformer Engine's linears and norms with {attention}, because it can be imported",
        )
    if device == "cuda" and model.multi_latent_attention:
        raise ConfigError(
            "model.multi_latent_attention = true on a GPU needs Transformer Engine: core 0.16.1 asks for one "
            "of its classes, and stops without it. Install transformer-engine, or set parallel.device=cpu."
        )
    if device == "cuda" and apex.has_norms():
        why = "Transformer Engine is not installed, and NVIDIA apex is"
        norms = f"layers: core's parallel linears, apex's fused norms and our SDPA attention, because {why}"
        return local_spec(model, ApexNorm), ApexNorm, norms
    why = "neither Transformer Engine nor apex is installed" if device == "cuda" else "Transformer Engine needs CUDA"
    return local_spec(model), Norm, f"layers: core's parallel linears, our norm and SDPA attention, because {why}"


def transformer_engine_spec(model: ModelConfig, packed_documents: bool) -> tuple[ModuleSpec, Any]:
    """Core's TE layer; with packed documents its attention is ours."""
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=model.qk_layernorm, multi_latent_attention=model.multi_latent_attention
    )
    if model.multi_latent_attention:
        with_whole_latents(spec)
    if packed_documents:
        spec.submodules.self_attention.submodules.core_attention = SelfAttentionCore
    return spec, TENorm


def local_spec(model: ModelConfig, norm: type[Norm] = Norm) -> ModuleSpec:
    """Core's TransformerLayer, attention, MLP and parallel linears around our norm and attention."""
    attention = latent_attention(model) if model.multi_latent_attention else self_attention(model, norm)
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # The names under which a TE layer stores its norms, so that either spec reads the other's checkpoint.
            sharded_state_dict_keys_map={
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
                **(LATENT_NORM_KEYS if model.multi_latent_attention else ATTENTION_NORM_KEYS),
            },
        ),
    )


def self_attention(model: ModelConfig, norm: type[Norm] = Norm) -> ModuleSpec:
    """Core's SelfAttention; with ``qk_layernorm`` every query and key head is normalised before it is rotated."""
    head_norm = norm if model.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SelfAttentionCore,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def layer_specs(
    spec: ModuleSpec, norm: Any, model: ModelConfig, layers: range, *, grouped_gemm: bool
) -> list[ModuleSpec]:
    """The spec of each of ``layers``, counted from 0 over the whole model: ``spec``, or experts in its MLP's place."""
    if model.num_moe_experts is None:
        return [spec] * len(layers)
    experts = with_experts(spec, norm, model, grouped_gemm=grouped_gemm)
    return [experts if model.is_moe_layer(layer) else spec for layer in layers]


def block_submodules(specs: list[ModuleSpec], norm: Any) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm. A chunk without layers is legal: embedding or loss alone."""
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
