"""Transformer Engine's attention in the dry world.

Read from NVIDIA/TransformerEngine v2.11, ``{backends,context_parallel,utils,softmax}.py`` of
``pytorch/attention/dot_product_attention``, and ``pytorch/csrc/extensions/attention.cpp``.

Shapes: S sequence (local: S / cp), B batch, N query heads and M key heads of this rank, D head dim (values may differ).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel.declared_fusions import dropout
from megatron_slm.parallel.declared_norm import Module
from megatron_slm.parallel.declared_ops import KERNELS, kernel


class DotProductAttention(Module):
    """``te.pytorch.DotProductAttention`` of layout sbhd: no parameters."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        *,
        cp_group: Any = None,
        cp_comm_type: str = "p2p",
        attn_mask_type: str = "causal",
        attention_dropout: float = 0.0,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        self.attn_mask_type = attn_mask_type
        self.dropout = attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        **ignored: Any,
    ) -> Tensor:
        """query [S, B, N, D], key [S, B, M, D], value [S, B, M, Dv] -> [S, B, N * Dv]."""
        # A value that is a part of the packed projection fits none of the kernel's layouts; all three are then copied.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        causal = "causal" in (attn_mask_type or self.attn_mask_type)
        backend = KERNELS.get().attention
        if self.cp_group is None or self.cp_group.size() == 1:
            out = (
                unfused(query, key, value, self.dropout if self.training else 0.0)
                if backend == "unfused"
                else ONE_KERNEL[backend](query, key, value, causal)
            )
        elif self.cp_comm_type == "a2a":
            out = AttentionOverHeads.apply(query, key, value, causal, self.cp_group)
        else:
            out = AttentionOverBlocks.apply(query, key, value, causal, self.cp_group)
        flat: Tensor = out.view(*out.shape[:2], -1)
        return flat


def attention_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, B, N, Dv], softmax statistics [B, N, S, 1] in fp32 and the random state [2] of the dropout."""
    length, batch, heads, _ = query.shape
    out = query.new_empty(length, batch, heads, value.shape[-1])
    statistics = query.new_empty(batch, heads, length, 1, dtype=torch.float32)
    random = query.new_empty(2, dtype=torch.int64)
    kernel("attention", [query, key, value], [out, statistics], flops(query, key, value, causal))
    return out, statistics, random


def attention_backward(grad_output: Tensor, saved: tuple[Tensor, ...], causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; five products for the forward pass's two."""
    query, key, value, out, statistics, _ = saved
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    scratch = query.new_empty(query.shape, dtype=torch.float32)  # the query's gradient is summed in fp32
    sums = torch.empty_like(statistics)
    work = flops(query, key, value, causal) * 5 // 2
    kernel("attention", [grad_output, query, key, value, out, statistics, scratch, sums], [*grads], work)
    return grads


def flops(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> int:
    """Of the two products of a forward pass; half of them under a causal mask."""
    length, batch, heads, width = query.shape
    total = 2 * length * key.shape[0] * batch * heads * (width + value.shape[-1])
    return total // 2 if causal else total


class Attention(torch.autograd.Function):
    """``FusedAttnFunc``: keeps query, key, value, output, softmax statistics and the random state."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        out, statistics, random = attention_forward(query, key, value, causal)
        ctx.save_for_backward(query, key, value, out, statistics, random)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return *attention_backward(grad_output.contiguous(), ctx.saved_tensors, ctx.causal), None


def flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """``FlashAttention``: batch first, so that more than one sample is copied in and out."""
    swapped = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    out: Tensor = Attention.apply(*swapped, causal)
    return out if query.shape[1] == 1 else out.clone()


def unfused(query: Tensor, key: Tensor, value: Tensor, probability: float) -> Tensor:
    """``UnfusedDotProductAttention``: scores [B, N, S, S] in memory; their softmax is kept."""
    length, batch, heads, _ = query.shape
    if key.shape[2] != heads:
        key = key.repeat_interleave(heads // key.shape[2], dim=2)
        value = value.repeat_interleave(heads // value.shape[2], dim=2)
    rows = [tensor.reshape(tensor.shape[0], batch * heads, -1).transpose(0, 1) for tensor in (query, key, value)]
    scores = query.new_empty(batch * heads, length, key.shape[0])
    scores = torch.baddbmm(scores, rows[0], rows[1].transpose(1, 2), beta=0.0)
    probabilities = Softmax.apply(scores.view(batch, heads, length, -1)).view(scores.shape)
    probabilities = dropout(probabilities, probability)
    out = torch.bmm(probabilities, rows[2]).view(batch, heads, length, -1)
    return out.permute(2, 0, 1, 3).contiguous()


class Softmax(torch.autograd.Function):
    """Transformer Engine's fused scale, mask and softmax: keeps its output; its gradient overwrites the output's."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        out = torch.empty_like(scores)
        kernel("memory", [scores], [out])
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad = grad_output.contiguous()
        kernel("memory", [grad, *ctx.saved_tensors], [grad])
        return grad


ONE_KERNEL = {"fused": Attention.apply, "flash": flash}


class AttentionOverHeads(torch.autograd.Function):
    """``AttnFuncWithCPAndQKVOA2A``: the whole sequence for N / cp heads between two exchanges.

    Keeps query, key and value as exchanged, the output before it is exchanged back, and the statistics.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, group: Any) -> Tensor:
        query, key, value = (to_heads(tensor, group) for tensor in (query, key, value))
        out, statistics, random = attention_forward(query, key, value, causal)
        ctx.save_for_backward(query, key, value, out, statistics, random)
        ctx.causal, ctx.group = causal, group
        return to_sequence(out, group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = ctx.saved_tensors
        grad_out = to_heads(grad_output.view(-1, *grad_output.shape[1:]), ctx.group)
        grads = attention_backward(grad_out, saved, ctx.causal)
        return *(to_sequence(grad, ctx.group) for grad in grads), None, None


def to_heads(part: Tensor, group: Any) -> Tensor:
    """[S, B, N, D] -> [cp S, B, N / cp, D]: packed, exchanged, put in order."""
    length, batch, heads, width = part.shape
    cp = group.size()
    packed = part.new_empty(cp, length, batch, heads // cp, width)
    kernel("memory", [part], [packed])
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group)
    ordered = torch.empty_like(packed)
    kernel("memory", [received], [ordered])
    return ordered.view(cp * length, batch, heads // cp, width)


def to_sequence(part: Tensor, group: Any) -> Tensor:
    """[cp S, B, N / cp, D] -> [S, B, N, D]."""
    length, batch, heads, width = part.shape
    cp = group.size()
    packed = torch.empty_like(part)
    kernel("memory", [part], [packed])
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group)
    ordered = torch.empty_like(packed)
    kernel("memory", [received], [ordered])
    return ordered.view(length // cp, batch, heads * cp, width)


class AttentionOverBlocks(torch.autograd.Function):
    """``AttnFuncWithCPAndKVP2P``: keys and values go around the cp ranks.

    Keeps query, keys and values joined, output and statistics. Forward: a buffer of keys and values, an output and
    statistics for each step, all of them until the last. Backward: two buffers each of keys and values and of their
    gradients, and the gradients of one step.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, group: Any) -> Tensor:
        joined = key.new_empty(key.numel() + value.numel())
        buffers, steps = [joined], []
        for step in range(group.size()):
            if step + 1 < group.size():
                buffers.append(exchanged_around(buffers[-1], group))
            queries, keys, values = block(query, key, value, step, group, causal)
            steps.append(attention_forward(queries, keys, values, causal and step == 0))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        statistics = steps[0][1]
        kernel("memory", [part for each in steps for part in each[:2]], [out])
        ctx.save_for_backward(query, joined, out, statistics)
        ctx.shapes, ctx.causal, ctx.group = (key.shape, value.shape), causal, group
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        query, joined, out, statistics = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        group = ctx.group
        sizes = [shape.numel() for shape in ctx.shapes]
        key, value = (part.view(shape) for part, shape in zip(joined.split(sizes), ctx.shapes, strict=True))
        grad_query = torch.empty_like(query)
        grad_joined = torch.empty_like(joined)
        received = exchanged_around(joined, group), torch.empty_like(grad_joined)
        for step in range(group.size()):
            queries, keys, values = block(query, key, value, step, group, ctx.causal)
            outs = out[: len(queries)]
            saved = queries, keys, values, outs, statistics, statistics
            parts = attention_backward(grad_output[: len(queries)], saved, ctx.causal and step == 0)
            kernel("memory", parts, [grad_query, grad_joined])
        del received
        grads = torch.empty_like(key), torch.empty_like(value)
        kernel("memory", [grad_joined], grads)
        return grad_query, *grads, None, None


def block(
    query: Tensor, key: Tensor, value: Tensor, step: int, group: Any, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step of the ring attends: under a causal mask all queries to half the keys of a rank before this one, or
    half the queries to all keys of one behind it."""
    half = len(query) // 2
    if not causal or step == 0:
        return query, key, value
    return (query, key[:half], value[:half]) if step <= group.rank() else (query[half:], key, value)


def exchanged_around(buffer: Tensor, group: Any) -> Tensor:
    """What the previous rank of the ring held."""
    received = torch.empty_like(buffer)
    ranks = dist.get_process_group_ranks(group)
    at = group.rank()
    dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, buffer, ranks[(at + 1) % len(ranks)], group),
            dist.P2POp(dist.irecv, received, ranks[at - 1], group),
        ]
    )
    return received
