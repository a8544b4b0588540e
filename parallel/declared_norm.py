"""Transformer Engine's norms in the dry world.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/ops/basic/{rmsnorm,layer_norm}.py`` and
``pytorch/csrc/extensions/normalization.cpp``.

Shapes: T tokens of this rank, H channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.parallel.declared_ops import kernel


def norm_forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """rows [T, H] -> normalised [T, H], and in fp32 [T] 1/sigma, of a LayerNorm also the mean."""
    out = torch.empty_like(rows)
    statistics = [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(1 if bias is None else 2)]
    kernel("memory", [rows, weight], [out, *statistics])
    return out, statistics


def norm_backward(
    grads: Tensor, rows: Tensor, statistics: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of rows [T, H], weight and bias [H]."""
    grad_rows = torch.empty_like(rows)
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    kernel("memory", [grads, rows, *statistics, weight], [grad_rows, grad_weight])
    return grad_rows, grad_weight, grad_bias


class Module(nn.Module):
    """``TransformerEngineBaseModule``: without FP8 its extra state is an empty tensor."""

    fp8, fp8_calibration = False, False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False}

    def get_extra_state(self) -> Tensor:
        """Core's checkpoints ask for it by name."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing is in it."""


class NormFunction(torch.autograd.Function):
    """Keeps its input and the statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        out, statistics = norm_forward(rows, weight, bias)
        ctx.save_for_backward(rows, weight, bias, *statistics)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rows, weight, bias, *statistics = ctx.saved_tensors
        grads = grad_output.contiguous().view(rows.shape)
        grad_rows, grad_weight, grad_bias = norm_backward(grads, rows, statistics, weight, bias)
        return grad_rows.view(grad_output.shape), grad_weight, grad_bias


class RMSNorm(Module):
    """``te.pytorch.RMSNorm``."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H], normalised over H."""
        out: Tensor = NormFunction.apply(x, self.weight, self.bias)
        return out


class LayerNorm(RMSNorm):
    """``te.pytorch.LayerNorm``."""

    def __init__(self, hidden_size: int, *, sequence_parallel: bool = False, **options: Any) -> None:
        super().__init__(hidden_size, sequence_parallel=sequence_parallel, **options)
        self.bias = nn.Parameter(torch.empty_like(self.weight))
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
