"""AdamW through core's optimizers (distributed or not), parameter groups, the gradient norm and one update."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig as CoreOptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_slm.model.gpt import is_hidden_matrix
from megatron_slm.parallel.router import balance, routers
from megatron_slm.train.config import OptimizerConfig, PrecisionConfig
from megatron_slm.train.optimizer_state import inner_optimizers

_FUSED = {
    "transformer_engine": "Transformer Engine, because it can be imported",
    "apex": "NVIDIA apex, because it can be imported and Transformer Engine cannot",
}
"""The order in which core looks."""


def build_optimizer(
    chunks: list[Any],
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    groups: Any,
    *,
    distributed: bool,
    width_multiplier: float = 1.0,
) -> MegatronOptimizer:
    """Core's optimizer over the wrapped chunks.

    Matrices decay, one-dimensional parameters and biases do not (core's standard groups). Under muP the learning rate
    of hidden matrices is divided by ``width_multiplier`` (arXiv 2203.03466, table 8, Adam).
    """
    config = CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision.bf16,
        params_dtype=getattr(torch, precision.params_dtype),
        use_distributed_optimizer=distributed,
        # The gather overlaps when the chunks were wrapped so; core wants to hear it twice.
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    built = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=_overrides(optimizer, width_multiplier),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    for inner in inner_optimizers(built):
        use_fused_adam(inner.optimizer)
    # Beside the parameters, what an update moves: see ``parallel.router.balance``.
    built.balanced_routers = [
        router for router in routers(chunks) if router.expert_bias is not None and router.weight.requires_grad
    ]
    return built


def _overrides(optimizer: OptimizerConfig, width_multiplier: float) -> dict[ParamKey, ParamGroupOverride]:
    """No decay for vectors and biases; the muP learning rate for hidden matrices."""
    is_vector = ParamWithNamePredicate(
        name="vector_or_bias", fn=lambda param, name: len(param.shape) == 1 or name.endswith(".bias")
    )
    overrides = {ParamKey(with_name_predicate=is_vector): ParamGroupOverride(wd_mult=0.0)}
    if width_multiplier != 1.0:
        is_hidden = ParamWithNamePredicate(name="hidden_matrix", fn=lambda param, name: is_hidden_matrix(name))
        overrides[ParamKey(with_name_predicate=is_hidden)] = ParamGroupOverride(
            max_lr=optimizer.lr / width_multiplier, min_lr=optimizer.min_lr / width_multiplier
        )
    return overrides


def use_fused_adam(inner: torch.optim.Optimizer) -> None:
    """Let torch update all elements of a tensor in one pass; core does not offer the choice."""
    if isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False


def kernels_reason(optimizer: MegatronOptimizer) -> str:
    """One sentence on whose AdamW updates the parameters, and why: core's choice, made when it is imported."""
    inner = next(iter(inner_optimizers(optimizer)), None)
    if inner is None:
        return "optimizer: nothing to update on this rank"
    name, package = type(inner.optimizer).__name__, type(inner.optimizer).__module__.partition(".")[0]
    if package in _FUSED:
        return f"optimizer: {name} of {_FUSED[package]}"
    on_gpu = any(param.is_cuda for group in inner.optimizer.param_groups for param in group["params"])
    why = "neither Transformer Engine nor NVIDIA apex is installed" if on_gpu else "theirs need CUDA"
    return f"optimizer: torch's {name}, fused, and not Transformer Engine's or apex's, because {why}"


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, peak: float) -> None:
    """Write this step's rate and decay into the groups; a group with its own peak keeps its ratio to ``peak``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (group["max_lr"] / peak if peak else 1.0)
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Put the reduced gradients into the optimizer's own tensors; returns their global L2 norm."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm() or 0.0)


def apply_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip by the norm that ``gradient_norm`` has returned, step, gather the parameters and balance the experts.

    Core's own ``step`` does all of it at once; between its parts the batch can still be rejected.
    """
    for inner in inner_optimizers(optimizer):
        parameters = inner.get_parameters()
        if inner.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=inner.config.clip_grad, total_norm=grad_norm)
    with torch.no_grad():
        optimizer.step_with_ready_grads()
        balance(optimizer.balanced_routers)
