"""Which modules a transformer layer is made of: Transformer Engine's where it can be imported, ours otherwise."""

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

from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.norm import Norm


def choose_spec(device: str, *, packed_documents: bool) -> tuple[ModuleSpec, Any, str]:
    """The layer's spec, the final norm's class, and one sentence that says which and why.

    Args:
        device: "cuda" or "cpu".
        packed_documents: tokens attend to their own document only; our attention reads the documents in both specs.
    """
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        spec, norm = transformer_engine_spec(packed_documents)
        attention = "our SDPA attention, which reads packed documents" if packed_documents else "TE's attention"
        return (
            spec,
            norm,
            f"layers: Transformer Engine's linears and norms with {attention}, because it can be imported",
        )
    why = "Transformer Engine is not installed" if device == "cuda" else "Transformer Engine needs CUDA"
    return local_spec(), Norm, f"layers: core's parallel linears, our norm and SDPA attention, because {why}"


def transformer_engine_spec(packed_documents: bool) -> tuple[ModuleSpec, Any]:
    """Core's TE layer; with packed documents its attention is ours."""
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec()
    if packed_documents:
        spec.submodules.self_attention.submodules.core_attention = SelfAttentionCore
    return spec, TENorm


def local_spec() -> ModuleSpec:
    """Core's TransformerLayer, SelfAttention, MLP and parallel linears around our norm and attention."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SelfAttentionCore,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # The names under which a TE layer stores its norms, so that either spec reads the other's checkpoint.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_submodules(spec: ModuleSpec, norm: Any, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm. A chunk without layers is legal: embedding or loss alone."""
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
