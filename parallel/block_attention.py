"""Attention of a block of query rows over a block of keys, with what it takes to add blocks up.

The blocks of a row are merged by their log-sum-exp. Backwards every block is given the merged output and log-sum-exp,
and yields its part of the whole gradient: dS = P (dP - delta) needs nothing else of the other blocks (FlashAttention-2,
arXiv 2307.08691, section 3.1). torch's fused kernels compute both, and none holds a score matrix.

Shapes: R query rows and T keys of the block, B batch, N query heads, G key/value heads, D width of queries and keys, E
width of values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_OF_EFFICIENT = 32
"""CUDA's memory-efficient kernel stores the log-sum-exp in multiples of so many rows."""


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, N, R, D], k [B, G, T, D], v [B, G, T, E] -> output [B, N, R, E] and log-sum-exp [B, N, R].

    Args:
        causal: R equals T, and a row sees the keys up to its own; else it sees all.
    """
    width = v.shape[-1]
    q, k, v = of_one_width(q, k, v)
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out[..., :width], lse
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[..., :width], lse[..., : q.shape[2]]


def backward(
    gradient: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the block's q, k and v, in their shapes.

    Args:
        gradient: of the merged output, [B, N, R, E].
        out: merged output of these rows over all their blocks, [B, N, R, E].
        lse: merged log-sum-exp of these rows, [B, N, R].
    """
    widths, groups = [x.shape[-1] for x in qkv], qkv[1].shape[1]
    q, k, v = of_one_width(*qkv)
    gradient, out = (_widened(x, v.shape[-1]) for x in (gradient, out))
    if not q.is_cuda:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    else:
        k, v = (x.repeat_interleave(q.shape[1] // groups, dim=1) for x in (k, v))
        dq, dk, dv = _backward_on_cuda(gradient, (q, k, v), out, lse, causal=causal, scale=scale)
        grads = dq, *(x.unflatten(1, (groups, -1)).sum(dim=2) for x in (dk, dv))
    dq, dk, dv = (grad[..., :width] for grad, width in zip(grads, widths, strict=True))
    return dq, dk, dv


def _backward_on_cuda(
    gradient: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` for k and v of as many heads as q. Written after torch's schemas; it has not run on a GPU yet."""
    q, k, v = qkv
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # state of a dropout that there is not
    if q.dtype == torch.float32:
        padded = F.pad(lse, (0, -lse.shape[-1] % _ROWS_OF_EFFICIENT), value=float("inf")).contiguous()
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            gradient, q, k, v, None, out, padded, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
        )
    else:
        lengths = None, None, q.shape[2], k.shape[2]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, unused, unused, scale=scale
        )
    return dq, dk, dv


def of_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three padded with zeros to one width, which fused kernels ask for; on a GPU to a multiple of 8."""
    width = max(q.shape[-1], v.shape[-1])
    width += -width % 8 if q.is_cuda else 0
    return _widened(q, width), _widened(k, width), _widened(v, width)


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
