"""The layers of AlephLayouts' program in the dry world: plain modules, FlashAttention, whole logits on every rank.

Read from Aleph-Alpha/scaling, the framework of those runs as published later: ``core/nn/norm/rms_norm.py``,
``core/nn/mlp.py``, ``core/nn/linear/column_parallel_linear.py`` (the head gathers its output) and
``transformer/model/losses/cross_entropy.py``.

Shapes: S sequence, B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_slm import run
from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.core_config import transformer_config
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.parallel.norm import Norm
from megatron_slm.parallel.specs import local_spec

OPTIONS = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "deallocate_pipeline_outputs": False,
}


class PlainNorm(Norm):
    """``RMSNorm._standard_forward``: every step of the formula is an op of torch."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of [S, B, H]."""
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return out.float().type_as(x) * self.weight


def build_plain(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, *, fused_norm: bool
) -> run.BuiltModel:
    """``run.build_model`` as AlephLayouts' program builds it.

    Args:
        fused_norm: with FlashAttention's kernel for RMSNorm.
    """
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device="cuda")
    for name, value in OPTIONS.items():
        setattr(core, name, value)
    spec, norm = local_spec(config.model), Norm if fused_norm else PlainNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    built = run.assemble_model(config, groups, device, vocab_size, layers=run.Layers(core, spec, norm, "plain layers"))
    for chunk in built.chunks:
        if (layer := getattr(unwrap(chunk), "output_layer", None)) is not None:
            layer.forward = types.MethodType(_gathered_loss, layer)
    return built


def _gathered_loss(
    layer: Any,
    hidden: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
    *,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    objective: Any = None,
) -> Any:
    """The head's logits, gathered over tp, in fp32, and their cross-entropy."""
    local, bias = ColumnParallelLinear.forward(layer, hidden, weight, runtime_gather_output)
    if labels is None or loss_mask is None:
        return local, bias
    logits = gather_from_tensor_model_parallel_region(local)
    del local
    whole = logits.float().reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(whole, labels.t().reshape(-1), reduction="none")
    total = (losses * loss_mask.t().reshape(-1)).sum()
    return torch.stack([total, total.detach(), total.detach()])
