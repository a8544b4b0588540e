"""The layers of AlephLayouts' program in the dry world: plain modules, FlashAttention, whole logits on every rank.

Read from Aleph-Alpha/scaling, the framework of those runs as published later, at its first commit (7848929):
``core/nn/norm/rms_norm.py`` (in fp32 op by op, or FlashAttention's kernel; under sequence parallelism the norm gathers
its output, which the products behind it keep whole), ``core/nn/attention/attention.py``, ``core/nn/mlp.py``,
``core/nn/linear/column_parallel_linear.py`` (the head gathers its output),
``core/nn/parallel_module/parallel_module.py`` and ``core/nn/pipeline_schedule/train.py`` (the last stage has two
buffers of outputs, which it overwrites in turn: the logits of the micro-batch before are still there), and
``transformer/model/losses/cross_entropy.py``.

Shapes: S sequence, B batch, H hidden, F width of the MLP on this rank, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_slm import run_model
from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.core_config import transformer_config
from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.declared_norm import NormFunction
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
    """RMSNorm in fp32, op by op."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(config, hidden_size, eps, **options)
        self.gathers = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of [S, B, H]; under sequence parallelism [S / tp, B, H] -> [S, B, H]."""
        out = self.normalised(x)
        return gather_from_sequence_parallel_region(out) if self.gathers else out

    def normalised(self, x: Tensor) -> Tensor:
        """What the formula says."""
        wide = x.float()
        out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return out.type_as(x) * self.weight


class FusedNorm(PlainNorm):
    """FlashAttention's kernel (``flash_attn/ops/rms_norm.py``), which keeps its input and one number a token."""

    def normalised(self, x: Tensor) -> Tensor:
        out: Tensor = NormFunction.apply(x, self.weight, None)
        return out


class PlainAttention(SelfAttentionCore):
    """Several samples are put in the order of the product behind them by a copy; the kernel keeps its own output."""

    def forward(self, query: Tensor, *rest: Any, **options: Any) -> Tensor:
        """query [S, B, N, D] -> [S, B, N * D]."""
        out = super().forward(query, *rest, **options)
        return out if query.shape[1] == 1 else out.clone()


class PlainMLP(MLP):
    """``ParallelSwiGLUMLP``."""

    def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H] and no bias."""
        both, _ = self.linear_fc1(hidden_states)
        gate, x = both.chunk(2, dim=-1)
        out: tuple[Tensor, Tensor | None] = self.linear_fc2(F.silu(gate) * x)
        return out


class Widened(torch.autograd.Function):
    """Logits in fp32. Those in half precision are an output of the pipeline's: they stay until the next ones are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.layer = layer
        return logits.float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        ctx.layer.logits_before = logits.detach()
        return grad_output.type_as(logits), None


def build_plain(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, *, fused_norm: bool
) -> run_model.BuiltModel:
    """``run_model.build_model`` as AlephLayouts' program builds it.

    Args:
        fused_norm: with FlashAttention's kernel for RMSNorm.
    """
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device="cuda")
    for name, value in OPTIONS.items():
        setattr(core, name, value)
    spec, norm = local_spec(config.model), FusedNorm if fused_norm else PlainNorm
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.submodules.core_attention = PlainAttention
    parts.mlp.module = PlainMLP
    built = run_model.assemble_model(
        config, groups, device, vocab_size, layers=run_model.Layers(core, spec, norm, "plain layers")
    )
    for chunk in built.chunks:
        for layer in unwrap(chunk).modules():
            if isinstance(layer, ColumnParallelLinear) and core.sequence_parallel:
                layer.explicit_expert_comm = True  # the norm before it gathers its input, and scatters the gradient
        if (layer := getattr(unwrap(chunk), "output_layer", None)) is not None:
            layer.forward = types.MethodType(_gathered_loss, layer)
    return built


def _gathered_loss(
    layer: Any,
    hidden: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
    *,
    ending: Any = None,
    fields: Mapping[str, Tensor] | None = None,
) -> Any:
    """The head's logits, gathered over tp, in fp32, and their cross-entropy."""
    local, bias = ColumnParallelLinear.forward(layer, hidden, weight, runtime_gather_output)
    if fields is None:
        return local, bias
    labels, loss_mask = fields["labels"], fields["loss_mask"]
    logits = gather_from_tensor_model_parallel_region(local)
    del local
    whole = Widened.apply(logits, layer).reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(whole, labels.t().reshape(-1), reduction="none")
    total = (losses * loss_mask.t().reshape(-1)).sum()
    return torch.stack([total, total.detach(), total.detach()])
