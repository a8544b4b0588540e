"""What core compiles into one kernel on a GPU, in the dry world: its inputs and outputs without what lies between.

Read from megatron-core 0.16.1, ``fusions/fused_bias_{swiglu,gelu,geglu}.py`` and ``tensor_parallel/layers.py``; the
dry world's core runs them operator by operator, because nothing is compiled on a CPU.

Shapes: T tokens of this rank, F width of the MLP on this rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.declared_ops import kernel


def gated(x: Tensor, *added: Any) -> Tensor:
    """x [..., 2 F] -> [..., F]: ``swiglu``, ``bias_swiglu``, ``weighted_swiglu`` and their likes."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    kernel("memory", [x], [out])
    return out


def gated_backward(grad_output: Tensor, x: Tensor, *added: Any) -> Tensor:
    """The gradient [..., 2 F] of what was gated."""
    grad = torch.empty_like(x)
    kernel("memory", [grad_output, x], [grad])
    return grad


def weighted_gated_backward(grad_output: Tensor, x: Tensor, weights: Tensor, *added: Any) -> tuple[Tensor, Tensor]:
    """Gradients of what was gated [T, 2 F] and of the weights [T, 1]."""
    return gated_backward(grad_output, x), torch.empty_like(weights)


def biased(x: Tensor, *added: Any) -> Tensor:
    """x [..., F] -> [..., F]: ``bias_gelu`` and ``weighted_squared_relu``."""
    out = torch.empty_like(x)
    kernel("memory", [x], [out])
    return out


def bias_gelu(bias: Tensor, x: Tensor) -> Tensor:
    """Core's order of arguments."""
    return biased(x)


def bias_gelu_backward(grad_output: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The gradient of bias and input alike."""
    return gated_backward(grad_output, x)


def accumulate(rows: Tensor, grads: Tensor, main_grad: Tensor) -> None:
    """``fused_weight_gradient_mlp_cuda``: rows [T, I] and grads [T, O] are multiplied into ``main_grad`` [O, I]."""
    kernel("gemm", [rows, grads], [main_grad], 2 * rows.numel() * grads.shape[-1])


def weight_gradient_extension() -> types.SimpleNamespace:
    """apex's extension module by the names core calls."""
    return types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], scale: Any) -> None:
    """Transformer Engine's kernel of that name: the first list of tensors, scaled, into the second."""
    kernel("memory", lists[0], lists[1])


class Dropout(torch.autograd.Function):
    """``native_dropout`` of a GPU: keeps a mask of one byte an element (torch ``ATen/native/cuda/Dropout.cu``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        kernel("memory", [x], [out, mask])
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad = torch.empty_like(grad_output)
        kernel("memory", [grad_output, *ctx.saved_tensors], [grad])
        return grad


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.dropout``; a CPU would keep its mask in the precision of the input."""
    if p == 0.0 or not training:
        return input
    out: Tensor = Dropout.apply(input)
    return out
