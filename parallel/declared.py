"""The layers of a GPU in the dry world: core's own classes over stand-ins for Transformer Engine's modules.

Core's ``extensions/transformer_engine.py`` wraps Transformer Engine; a private copy of it is made here over packages
that hold the stand-ins, so that names, shapes and marks of the parameters are what core makes of them. The stand-ins
save and allocate what the modules of the version they were read from do, and compute nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron.core import utils as core_utils
from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer
from megatron.core.extensions import transformer_engine as extension, transformer_engine_spec_provider
from megatron.core.fusions import fused_bias_geglu, fused_bias_gelu, fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.tensor_parallel import layers, random
from megatron.core.transformer import attention, multi_latent_attention, multi_token_prediction, transformer_block
from megatron.core.transformer.moe import experts, moe_layer, moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from packaging.version import Version
from torch.nn import functional

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel import (
    declared_attention,
    declared_experts,
    declared_fp8,
    declared_fp8_linear,
    declared_fusions,
    declared_norm,
    declared_rotation,
)
from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.declared_ops import KERNELS, PERSISTENT, Kernels, dummy_gradient
from megatron_slm.parallel.latent import with_whole_latents

VERSION = "2.11.0"
"""Of Transformer Engine, as the stand-ins were read."""


def declared_spec(model: ModelConfig, packed_documents: bool) -> tuple[ModuleSpec, Any]:
    """``parallel.specs.transformer_engine_spec`` with the stand-ins in the place of Transformer Engine's modules.

    To be called, as whatever is built of it, inside of ``declared_kernels``.
    """
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=model.qk_layernorm, multi_latent_attention=model.multi_latent_attention
    )
    if model.multi_latent_attention:
        with_whole_latents(spec)
    if packed_documents:
        spec.submodules.self_attention.submodules.core_attention = SelfAttentionCore
    return spec, declared_extension().TENorm


def declared_options(model: ModelConfig, *, published: bool) -> dict[str, Any]:
    """Core's options on a GPU, where ``model.core_config.transformer_config`` of the CPU says otherwise.

    Args:
        published: those of Megatron-LM's command line, by default, beside them.
    """
    options: dict[str, Any] = {"deallocate_pipeline_outputs": True}
    if published:
        options |= {
            "gradient_accumulation_fusion": True,
            # Of latent attention core fuses YaRN alone.
            "apply_rope_fusion": model.position_embedding_type == "rope"
            and (not model.multi_latent_attention or model.rope_type == "yarn"),
            # Core fuses the exact GELU with a bias, and SwiGLU with or without one.
            "bias_activation_fusion": model.swiglu or (model.add_bias_linear and not model.openai_gelu),
        }
    return options


@functools.cache
def declared_extension() -> Any:
    """Core's extension module over the stand-ins."""
    module = _copy(extension, stand_in_packages())
    # What this process's core sees of torch: on CPU ranks a view of it.
    vars(module)["torch"] = extension.torch
    return module


@functools.cache
def declared_provider() -> Any:
    """Core's ``TESpecProvider``, which names the extension's classes to whoever makes a spec, over its copy."""
    packages = {**stand_in_packages(), extension.__name__: declared_extension()}
    return _copy(transformer_engine_spec_provider, packages).TESpecProvider


def _copy(original: types.ModuleType, packages: dict[str, types.ModuleType]) -> Any:
    """A second module of the same source, imported while ``packages`` can be."""
    assert original.__file__ is not None, "core's modules are files"
    source = importlib.util.spec_from_file_location(f"{original.__name__}_declared", original.__file__)
    assert source is not None and source.loader is not None, "a file can be loaded"
    module = importlib.util.module_from_spec(source)
    with _replaced({(core_utils, "_te_version"): Version(VERSION)}), _importable(packages):
        source.loader.exec_module(module)
    return module


def stand_in_packages() -> dict[str, types.ModuleType]:
    """``transformer_engine`` by the names under which core's extension imports its parts."""
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {"DelayedScaling": object, "Recipe": object},
        "pytorch": {
            "Linear": declared_fp8_linear.Linear,
            "LayerNormLinear": declared_fp8_linear.LayerNormLinear,
            "GroupedLinear": declared_fp8_linear.GroupedLinear,
            "DotProductAttention": declared_attention.DotProductAttention,
            "LayerNorm": declared_norm.LayerNorm,
            "RMSNorm": declared_norm.RMSNorm,
        },
        "pytorch.fp8": {"FP8GlobalStateManager": object, "fp8_autocast": contextlib.nullcontext},
        "pytorch.distributed": {"CudaRNGStatesTracker": object},
        "pytorch.ops": {"Sequential": object, "FusibleOperation": object},
        "pytorch.attention": {},
        "pytorch.attention.rope": {"apply_rotary_pos_emb": declared_rotation.apply_rotary_pos_emb},
        "pytorch.router": dict.fromkeys(
            ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
        ),
    }
    made = {name: types.ModuleType(f"transformer_engine.{name}".rstrip(".")) for name in contents}
    for name, module in made.items():
        module.__path__ = []
        vars(module).update(contents[name])
        parent, _, last = name.rpartition(".")
        if name:
            vars(made[parent])[last] = module
    return {module.__name__: module for module in made.values()}


@contextlib.contextmanager
def declared_kernels(kernels: Kernels | None = None) -> Iterator[None]:
    """Core runs the kernels of a GPU as they are declared; everything is as before afterwards."""
    PERSISTENT.clear()
    te = declared_extension()
    names = (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_unpermute",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "te_general_gemm",
    )
    swiglu, geglu, gelu = fused_bias_swiglu, fused_bias_geglu, fused_bias_gelu
    replacements: dict[tuple[Any, str], Any] = {
        (core_utils, "_te_version"): Version(VERSION),
        (gpt_layer_specs, "TESpecProvider"): declared_provider(),
        (moe_module_specs, "TESpecProvider"): declared_provider(),
        (multi_latent_attention, "HAVE_TE"): True,
        (multi_latent_attention, "TELinear"): te.TELinear,
        (multi_latent_attention, "TEColumnParallelLinear"): te.TEColumnParallelLinear,
        (rope_utils, "fused_apply_rotary_pos_emb"): te.fused_apply_rotary_pos_emb,
        (attention, "SplitAlongDim"): declared_rotation.SplitAlongDim.apply,
        (multi_latent_attention, "fused_apply_mla_rope_for_q"): declared_rotation.fused_apply_mla_rope_for_q,
        (multi_latent_attention, "fused_apply_mla_rope_for_kv"): declared_rotation.fused_apply_mla_rope_for_kv,
        (clip_grads, "multi_tensor_scale_impl"): declared_fusions.multi_tensor_scale,
        (functional, "dropout"): declared_fusions.dropout,
        (layers, "fused_weight_gradient_mlp_cuda"): declared_fusions.weight_gradient_extension(),
        (layers, "_grad_accum_fusion_available"): True,
        (layers, "get_dummy_wgrad"): dummy_gradient,
        (layers, "HAVE_TE"): True,
        (swiglu, "swiglu"): declared_fusions.gated,
        (swiglu, "bias_swiglu"): declared_fusions.gated,
        (swiglu, "weighted_swiglu"): declared_fusions.gated,
        (swiglu, "swiglu_back"): declared_fusions.gated_backward,
        (swiglu, "bias_swiglu_back"): declared_fusions.gated_backward,
        (swiglu, "weighted_swiglu_back"): declared_fusions.weighted_gated_backward,
        (gelu, "bias_gelu"): declared_fusions.bias_gelu,
        (gelu, "bias_gelu_back"): declared_fusions.bias_gelu_backward,
        (geglu, "geglu"): declared_fusions.gated,
        (geglu, "bias_geglu"): declared_fusions.gated,
        (geglu, "geglu_back"): declared_fusions.gated_backward,
        (geglu, "bias_geglu_back"): declared_fusions.gated_backward,
        (moe_utils, "HAVE_TE"): True,
        **{(moe_utils, name): getattr(declared_experts, name) for name in names},
        **_in_fp8(te),
    }
    token = KERNELS.set(kernels or Kernels())
    with _replaced(replacements):
        try:
            yield
        finally:
            KERNELS.reset(token)
            PERSISTENT.clear()


def _in_fp8(te: Any) -> dict[tuple[Any, str], Any]:
    """What core asks for where ``precision.fp8`` is set."""
    holders = (distributed_data_parallel, param_and_grad_buffer, distrib_optimizer)
    return {
        (transformer_block, "get_fp8_context"): declared_fp8.core_context,
        (multi_token_prediction, "get_fp8_context"): declared_fp8.core_context,
        (transformer_block, "te_checkpoint"): declared_fp8.checkpoint,
        (moe_layer, "te_checkpoint"): declared_fp8.checkpoint,
        (extension, "te_checkpoint"): declared_fp8.checkpoint,
        (extension, "TELinear"): te.TELinear,
        (attention, "HAVE_TE"): True,
        (attention, "TELinear"): te.TELinear,
        (attention, "set_save_original_input"): extension.set_save_original_input,
        (experts, "HAVE_TE"): True,
        (experts, "Fp8Padding"): declared_fp8.Padding,
        (experts, "Fp8Unpadding"): declared_fp8.Unpadding,
        **{(room, "is_float8tensor"): declared_fp8.is_in_fp8 for room in holders},
        (param_and_grad_buffer, "modify_underlying_storage"): declared_fp8.store_in,
        (distrib_optimizer, "quantize_param_shard"): declared_fp8.quantize_shards,
        (random, "FP8GlobalStateManager"): declared_fp8.AutocastState,
        (random, "fp8_autocast"): declared_fp8.AutocastState.again,
        (random, "activation_recompute_forward"): lambda **ignored: contextlib.nullcontext(),
    }


@contextlib.contextmanager
def _replaced(replacements: dict[tuple[Any, str], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for (owner, name), becomes in replacements.items():
            before = vars(owner).get(name, stack)
            stack.callback(delattr, owner, name) if before is stack else stack.callback(setattr, owner, name, before)
            setattr(owner, name, becomes)
        yield


@contextlib.contextmanager
def _importable(packages: dict[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(packages)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
