"""Fused rotary positions, and the split in front of them, in the dry world.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/attention/rope.py`` and ``pytorch/utils.py`` (``SplitAlongDim``),
and from megatron-core 0.16.1, ``fusions/fused_mla_yarn_rope_apply.py``, whose kernels are Triton's.

Shapes: S sequence, B batch, N heads, D head dim, R rotated channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.declared_ops import kernel


class Rotation(torch.autograd.Function):
    """``FusedRoPEFunc``: keeps the table of angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return rotated(x, angles)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return rotated(grad_output, ctx.saved_tensors[0]), None


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """A new tensor of the shape of ``x``, contiguous."""
    out = x.new_empty(x.shape)
    kernel("memory", [x, angles], [out])
    return out


def apply_rotary_pos_emb(x: Tensor, freqs: Tensor, **ignored: Any) -> Tensor:
    """``transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb``, fused: x [S, B, N, D]."""
    out: Tensor = Rotation.apply(x, freqs)
    return out


class SplitAlongDim(torch.autograd.Function):
    """``transformer_engine.pytorch.attention._SplitAlongDim``: views; their gradients are joined by a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: list[int]) -> Any:
        ctx.dim = dim
        return torch.split(x, sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.cat(grads, dim=ctx.dim), None, None


class LatentQueryRotation(torch.autograd.Function):
    """``ApplyMLARotaryEmbQ``: in place, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kernel("memory", [query, cos, sin], [query])
        ctx.save_for_backward(cos, sin)
        return query.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad = grad_output.contiguous()
        kernel("memory", [grad, *ctx.saved_tensors], [grad])
        return grad, None, None


class LatentKeyRotation(torch.autograd.Function):
    """``ApplyMLARotaryEmbKV``: new keys and values; backward a new gradient of the joined ones."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor, values: int) -> Any:
        kept = joined.shape[-1] - values
        key = joined.new_empty(*joined.shape[:-1], kept + rotary.shape[-1])
        value = joined.new_empty(*joined.shape[:-1], values)
        kernel("memory", [joined, rotary, cos, sin], [key, value])
        ctx.save_for_backward(cos, sin)
        ctx.shapes = joined.shape, rotary.shape
        return key, value

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> Any:
        grad_key, grad_value = grad_key.contiguous(), grad_value.contiguous()
        grads = [grad_key.new_empty(shape) for shape in ctx.shapes]
        kernel("memory", [grad_key, grad_value, *ctx.saved_tensors], grads)
        return *grads, None, None, None


def fused_apply_mla_rope_for_q(query: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    """query [S, B, N, D + R], of which the last R channels are rotated."""
    out: Tensor = LatentQueryRotation.apply(query, cos, sin)
    return out


def fused_apply_mla_rope_for_kv(
    joined: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor, *widths: Any
) -> tuple[Tensor, Tensor]:
    """joined [S, B, N, D + Dv] and the shared rotary key [S, B, 1, R] -> keys [S, B, N, D + R], values [S, B, N, Dv].

    Args:
        widths: R, D and Dv, then what a packed sequence needs.
    """
    key, value = LatentKeyRotation.apply(joined, rotary, cos, sin, widths[2])
    return key, value
