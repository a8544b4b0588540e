"""A mixture-of-experts layer out of core's parts: its spec beside a dense layer's, and whose gradients its weights are.

Core's MoELayer routes, sends, computes and combines; the router is ours (``parallel/router.py``), and so are the marks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_slm.errors import ConfigError
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.router import Router

DENSE_NORM_KEY = "pre_mlp_layernorm."


def with_experts(dense: ModuleSpec, norm: Any, model: ModelConfig, *, grouped_gemm: bool) -> ModuleSpec:
    """The spec of a layer whose MLP is a mixture of experts, otherwise like ``dense``; that one is left as it is.

    Args:
        dense: a transformer layer of ``parallel.specs``; the experts' linears are of the same kind as its MLP's.
        norm: the class in front of router and experts. Transformer Engine fuses it into a dense MLP, but not here.
        grouped_gemm: all experts of a rank in one kernel (Transformer Engine).

    Raises:
        ConfigError: ``grouped_gemm`` without Transformer Engine.
    """
    mlp: MLPSubmodules = dense.submodules.mlp.submodules
    if mlp.linear_fc1 is ColumnParallelLinear:
        if grouped_gemm:
            raise ConfigError(
                "parallel.moe_grouped_gemm needs Transformer Engine, and these layers are built without it. Set "
                "parallel.moe_grouped_gemm=false, or install Transformer Engine for a GPU."
            )
        experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
        shared = ModuleSpec(module=SharedExpertMLP, submodules=mlp)
    else:
        parts = get_moe_module_spec(
            use_te=True, num_experts=model.num_moe_experts, moe_grouped_gemm=grouped_gemm
        ).submodules
        experts, shared = parts.experts, parts.shared_experts
    router = partial(Router, balanced_by_bias=model.moe_router_enable_expert_bias)
    names = {key: name for key, name in dense.submodules.sharded_state_dict_keys_map.items() if key != DENSE_NORM_KEY}
    submodules = dataclasses.replace(
        dense.submodules,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(
            module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=router)
        ),
        sharded_state_dict_keys_map=names,
    )
    return dataclasses.replace(dense, submodules=submodules)


def mark_expert_weights(chunk: nn.Module, groups: Any) -> None:
    """Say of every expert weight which ranks hold the same one, before core makes gradient buffers and optimizers.

    Core 0.16.1 takes this from degrees that are not always the experts': (1) with one rank in each ep group it reduces
    the gradients over the dense replicas, which is wrong where expert_tensor_parallel_size is not
    tensor_model_parallel_size (Megatron-LM PR 1622); (2) Transformer Engine's linears are not marked as divided, so
    the gradient norm misses those of every tp rank but the first (Megatron-LM PR 5916).
    """
    own_replicas = groups.ep.size() > 1 or groups.expt_tp.size() != groups.tp.size()
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            for param in module.experts.parameters():
                # What core reads as "reduce over the dense replicas" and "no tp rank holds a copy".
                param.allreduce = not own_replicas
                param.tensor_model_parallel = True
