"""Causal attention over cp ranks: keys and values of the other ranks come by, in a ring or gathered at once.

Every cp rank computes the output of its own queries. The keys of one other rank at a time are attended to as blocks
(``parallel/block_attention.py``) and merged (Ring Attention, arXiv 2310.01889); with the cut of ``parallel/context.py``
all ranks have the same work in every step. Saved for the backward pass are this rank's q, k, v, output and log-sum-exp.

Shapes: B batch, N query heads and G key/value heads of this tp rank, L = S/cp tokens of this cp rank, D width of
queries and keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel import block_attention
from megatron_slm.parallel.context import tokens_before

KEYS, GRADIENTS = range(2)
"""Tags of what goes round the ring; both may be under way at once."""


class Block(NamedTuple):
    """Query rows of this rank and keys of another: every row sees every key, or with ``causal`` those up to its own."""

    samples: slice
    rows: slice
    keys: slice
    causal: bool


class Exchange(Protocol):
    """How keys and values reach the other cp ranks. All methods are collective over the cp group."""

    rank: int
    size: int

    def visit(self, kv: Tensor, take: Callable[[int, Tensor], None]) -> None:
        """Call ``take(owner, keys and values of the owner)`` for every cp rank, this one first.

        Args:
            kv: this rank's, any shape that is the same on all of them.
        """

    def visit_and_return(self, kv: Tensor, take: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The same, and bring what ``take`` returns home to its owner: the sum over all ranks, of ``kv``'s shape."""


class Transfer(NamedTuple):
    """Something on its way to the next rank, and what comes from the one before."""

    works: list[Any]
    sent: Tensor
    """Must live until it has arrived."""
    received: Tensor

    def wait(self) -> Tensor:
        """What has come."""
        for work in self.works:
            work.wait()
        return self.received


class Ring:
    """``cp_comm_type`` p2p: each rank passes on what it has just received, while it computes with it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        self._next, self._before = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]

    def visit(self, kv: Tensor, take: Callable[[int, Tensor], None]) -> None:
        """See :class:`Exchange`. Beside its own, a rank holds the keys at hand and those that arrive."""
        for step in range(self.size):
            coming = self._pass_on(kv, KEYS) if step < self.size - 1 else None
            take((self.rank - step) % self.size, kv)
            kv = coming.wait() if coming is not None else kv

    def visit_and_return(self, kv: Tensor, take: Callable[[int, Tensor], Tensor]) -> Tensor:
        """See :class:`Exchange`. What belongs to a rank follows its keys, one step behind, and ends at its owner."""
        following: Transfer | None = None
        for step in range(self.size):
            coming = self._pass_on(kv, KEYS) if step < self.size - 1 else None
            share = take((self.rank - step) % self.size, kv)
            if following is not None:
                share += following.wait()
            following = self._pass_on(share, GRADIENTS)
            kv = coming.wait() if coming is not None else kv
        assert following is not None, "a ring has at least one rank"
        return following.wait()

    def _pass_on(self, tensor: Tensor, tag: int) -> Transfer:
        received = torch.empty_like(tensor)
        there = dist.P2POp(dist.isend, tensor, self._next, self._group, tag)
        here = dist.P2POp(dist.irecv, received, self._before, self._group, tag)
        return Transfer(dist.batch_isend_irecv([there, here]), tensor, received)


class Gathered:
    """``cp_comm_type`` all_gather: one exchange forward, two backward, and everyone's keys in memory meanwhile."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def visit(self, kv: Tensor, take: Callable[[int, Tensor], None]) -> None:
        """See :class:`Exchange`."""
        everyone = self._gather(kv)
        for owner in self._owners():
            take(owner, everyone[owner])

    def visit_and_return(self, kv: Tensor, take: Callable[[int, Tensor], Tensor]) -> Tensor:
        """See :class:`Exchange`. The keys are gathered again: kept, they would be cp times the memory."""
        everyone = self._gather(kv)
        shares = {owner: take(owner, everyone[owner]) for owner in self._owners()}
        mine = torch.empty_like(shares[self.rank])
        dist.reduce_scatter_tensor(mine, torch.cat([shares[rank] for rank in range(self.size)]), group=self._group)
        return mine

    def _owners(self) -> list[int]:
        return [(self.rank + step) % self.size for step in range(self.size)]

    def _gather(self, kv: Tensor) -> Tensor:
        everyone = kv.new_empty(self.size * kv.shape[0], *kv.shape[1:])
        dist.all_gather_into_tensor(everyone, kv, group=self._group)
        return everyone.view(self.size, *kv.shape)


def exchange(group: dist.ProcessGroup, cp_comm_type: str) -> Exchange:
    """The exchange that ``parallel.cp_comm_type`` names."""
    kinds: dict[str, type[Ring] | type[Gathered]] = {"p2p": Ring, "all_gather": Gathered}
    return kinds[cp_comm_type](group)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, *, scale: float, over: Exchange) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence: [B, N, L, D], [B, G, L, D | E] -> [B, N, L, E].

    Args:
        documents: int64 [B, S] on the host, of the whole sequence; None is one document per sample.
    """
    blocks = visible_blocks(documents, q.shape[2] * over.size, over.rank, over.size)
    out: Tensor = ContextAttention.apply(q, k, v, blocks, scale, over)
    return out


def visible_blocks(documents: Tensor | None, length: int, cp_rank: int, cp_size: int) -> list[list[Block]]:
    """By owner of the keys, the blocks that this rank's queries see of a sequence of ``length``.

    The tokens that a rank holds of a document are one run, because a document that reaches into both of its chunks
    holds all between them. Of a rank before this one, every query sees the first chunk; of a rank behind it, the
    queries of the second chunk see both.
    """
    half = length // (2 * cp_size)
    blocks: list[list[Block]] = [[] for _ in range(cp_size)]
    for samples, start, stop in document_spans(documents, length):
        first, last = (tokens_before(position, length, cp_rank, cp_size) for position in (start, stop))
        for owner in range(cp_size):
            key, end = (tokens_before(position, length, owner, cp_size) for position in (start, stop))
            rows = slice(max(first, half) if owner > cp_rank else first, last)
            keys = slice(key, min(end, half) if owner < cp_rank else end)
            if rows.start < rows.stop and keys.start < keys.stop:
                blocks[owner].append(Block(samples, rows, keys, causal=owner == cp_rank))
    return blocks


def document_spans(documents: Tensor | None, length: int) -> list[tuple[slice, int, int]]:
    """(samples, start, stop) of every document; without documents, one for all samples."""
    if documents is None:
        return [(slice(None), 0, length)]
    spans = []
    for sample, row in enumerate(documents):
        cuts = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
        spans += [
            (slice(sample, sample + 1), start, stop) for start, stop in zip([0, *cuts], [*cuts, length], strict=True)
        ]
    return spans


class ContextAttention(torch.autograd.Function):
    """The attention itself, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[list[Block]], scale: float, over: Exchange
    ) -> Tensor:
        """See :func:`attend`."""
        exact = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=exact, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=exact, device=q.device)

        def take(owner: int, kv: Tensor) -> None:
            keys, values = kv.split((k.shape[-1], v.shape[-1]), dim=-1)
            for samples, row, key, causal in blocks[owner]:
                own, seen = (samples, slice(None), row), (samples, slice(None), key)
                part = block_attention.forward(q[own], keys[seen], values[seen], causal=causal, scale=scale)
                merge(out[own], lse[own], *part)

        over.visit(torch.cat([k, v], dim=-1).contiguous(), take)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.blocks, ctx.scale, ctx.over = blocks, scale, over
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v. They are added up over blocks, and over ranks, in fp32 at least."""
        q, k, v, out, lse = ctx.saved_tensors
        widths = k.shape[-1], v.shape[-1]
        dq = torch.zeros_like(q, dtype=lse.dtype)

        def take(owner: int, kv: Tensor) -> Tensor:
            keys, values = kv.split(widths, dim=-1)
            share = torch.zeros_like(kv, dtype=lse.dtype)
            dk, dv = share.split(widths, dim=-1)
            for samples, row, key, causal in ctx.blocks[owner]:
                own, seen = (samples, slice(None), row), (samples, slice(None), key)
                block = q[own], keys[seen], values[seen]
                parts = block_attention.backward(
                    gradient[own], block, out[own], lse[own], causal=causal, scale=ctx.scale
                )
                for total, part in zip((dq[own], dk[seen], dv[seen]), parts, strict=True):
                    total += part
            return share

        share = ctx.over.visit_and_return(torch.cat([k, v], dim=-1).contiguous(), take)
        dk, dv = share.to(k.dtype).split(widths, dim=-1)
        return dq.to(q.dtype), dk, dv, None, None, None


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block's output and log-sum-exp into those of the blocks before it, in place."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp().unsqueeze(-1)).add_((block_lse - total).exp().unsqueeze(-1) * block_out)
    lse.copy_(total)
