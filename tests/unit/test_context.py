"""The cut of a sequence over cp ranks, and attention in blocks against the definition written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_slm.parallel import block_attention
from megatron_slm.parallel.context import cut, cut_batch, join, positions, tokens_before
from megatron_slm.parallel.ring import attend, visible_blocks
from tests.unit.test_attention import Shapes

B, N, G, D, E = 2, 4, 2, 8, 5


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_join_undoes_the_cut(cp: int) -> None:
    whole = torch.randn(B, 24, 3)
    parts = [cut(whole, 1, rank, cp) for rank in range(cp)]
    assert all(part.shape == (B, 24 // cp, 3) for part in parts)
    assert join(parts, 1).equal(whole)


def test_a_rank_holds_an_early_chunk_and_its_mirror_image() -> None:
    assert positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert positions(8, 1, 2).tolist() == [2, 3, 4, 5]


def test_tokens_before_counts_positions() -> None:
    for cp in (1, 2, 3):
        for rank in range(cp):
            held = positions(12, rank, cp)
            for position in range(13):
                assert tokens_before(position, 12, rank, cp) == int((held < position).sum())


def test_a_batch_is_cut_but_for_its_documents() -> None:
    batch = {name: torch.arange(16).view(2, 8) for name in ("tokens", "position_ids", "document_ids")}
    part = cut_batch(batch, 1, 2)
    assert part["document_ids"] is batch["document_ids"]
    assert part["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert cut_batch(batch, 0, 1) is batch


def test_a_sequence_that_has_no_equal_chunks_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="10 tokens are no 4 equal chunks"):
        cut(torch.zeros(10), 0, 0, 2)


def inputs(length: int, keys: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, length, D], k [B, G, keys, D], v [B, G, keys, E]: odd widths, views as attention makes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, B, N, D), (keys or length, B, G, D), (keys or length, B, G, E))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def by_definition(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``allowed`` [B | 1, rows, keys]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed[:, None], -math.inf)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def documents(length: int) -> Tensor:
    """One sample of many documents, some of one token; one sample of two."""
    ids = torch.zeros(B, length, dtype=torch.int64)
    ids[0] = (torch.rand(length, generator=torch.Generator().manual_seed(1)) < 0.3).long().cumsum(dim=0)
    ids[1, length // 3 :] = 1
    return ids


def allowed_pairs(length: int, ids: Tensor | None) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None]
    return causal if ids is None else causal & (ids[:, :, None] == ids[:, None, :])


@pytest.mark.parametrize(("rows", "keys", "causal"), [(7, 7, True), (7, 11, False), (11, 1, False), (1, 1, True)])
def test_a_block_follows_the_definition(rows: int, keys: int, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(rows, keys))
    allowed = torch.ones(1, rows, keys, dtype=torch.bool)
    expected, expected_lse = by_definition(q, k, v, allowed.tril() if causal else allowed, 0.3)
    with torch.no_grad():
        out, lse = block_attention.forward(q, k, v, causal=causal, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    grads = block_attention.backward(weight, (q, k, v), out, lse, causal=causal, scale=0.3)
    for found, wanted in zip(grads, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Beside:
    """The exchange of a rank whose peers are in the same process: it sees their keys, and keeps what it owes them."""

    def __init__(self, rank: int, everyone: list[Tensor], owed: list[Tensor]) -> None:
        self.rank, self.size = rank, len(everyone)
        self._everyone, self._owed = everyone, owed

    def visit(self, kv: Tensor, take: Callable[[int, Tensor], None]) -> None:
        for step in range(self.size):
            take((self.rank - step) % self.size, self._everyone[(self.rank - step) % self.size])

    def visit_and_return(self, kv: Tensor, take: Callable[[int, Tensor], Tensor]) -> Tensor:
        for owner in range(self.size):
            self._owed[owner] += take(owner, self._everyone[owner])
        return torch.zeros_like(kv)


def over_ranks(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, weight: Tensor, cp: int, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of q, k and v, each computed rank by rank and joined."""
    kv = torch.cat([k, v], dim=-1).detach()
    everyone = [cut(kv, 2, rank, cp) for rank in range(cp)]
    owed = [torch.zeros_like(part) for part in everyone]
    outs, dqs = [], []
    for rank in range(cp):
        part, keys, values = (cut(x.detach(), 2, rank, cp).requires_grad_() for x in (q, k, v))
        out = attend(part, keys, values, ids, scale=scale, over=Beside(rank, everyone, owed))
        out.backward(cut(weight, 2, rank, cp))  # type: ignore[no-untyped-call]
        assert part.grad is not None
        outs, dqs = [*outs, out.detach()], [*dqs, part.grad]
    dk, dv = join(owed, 2).split((k.shape[-1], v.shape[-1]), dim=-1)
    return join(outs, 2), [join(dqs, 2), dk, dv]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_all_ranks_together_follow_the_definition(cp: int, packed: bool) -> None:
    length = 48
    q, k, v = (x.requires_grad_() for x in inputs(length))
    ids = documents(length) if packed else None
    expected, _ = by_definition(q, k, v, allowed_pairs(length, ids), 0.3)
    weight = torch.randn_like(expected)
    found, grads = over_ranks(q, k, v, ids, weight, cp, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(grads, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_stay_within_their_rounding(dtype: torch.dtype) -> None:
    length, epsilon = 48, torch.finfo(dtype).eps
    q, k, v = (x.requires_grad_() for x in inputs(length, dtype=dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = by_definition(exact[0], exact[1], exact[2], allowed_pairs(length, None), 0.3)
    weight = torch.randn_like(expected).to(dtype)
    found, grads = over_ranks(q, k, v, None, weight, 2, 0.3)
    assert found.dtype == dtype
    for one, other in zip(
        [found, *grads], [expected, *torch.autograd.grad(expected, exact, weight.double())], strict=True
    ):
        assert (one - other).norm() <= 4 * epsilon * other.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_blocks_are_every_visible_pair_once(cp: int, packed: bool) -> None:
    length = 24
    ids = documents(length) if packed else None
    seen = torch.zeros(B, length, length, dtype=torch.int64)
    for rank in range(cp):
        for owner, blocks in enumerate(visible_blocks(ids, length, rank, cp)):
            for samples, rows, keys, causal in blocks:
                row, key = positions(length, rank, cp)[rows], positions(length, owner, cp)[keys]
                pairs = torch.ones(len(row), len(key), dtype=torch.int64)
                for sample in range(B)[samples]:
                    seen[sample][row[:, None], key[None, :]] += pairs.tril() if causal else pairs
    assert seen.equal(allowed_pairs(length, ids).expand(B, -1, -1).long())


@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_has_the_same_work_in_every_step(cp: int) -> None:
    work = [
        [sum((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in blocks) for blocks in owners]
        for owners in (visible_blocks(None, 64, rank, cp) for rank in range(cp))
    ]
    others = {work[rank][owner] for rank in range(cp) for owner in range(cp) if owner != rank}
    assert len(others) == 1 and {work[rank][rank] for rank in range(cp)} == {(64 // cp) ** 2}


def test_kept_for_the_backward_pass_is_what_this_rank_holds() -> None:
    """Its q, k, v and output, and a log-sum-exp of every row; nothing of another rank."""
    q, k, v = (cut(x, 2, 0, 2).requires_grad_() for x in inputs(48))
    everyone = [torch.cat([k, v], dim=-1).detach()] * 2
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = attend(q, k, v, None, scale=0.3, over=Beside(0, everyone, []))
    assert sorted(kept) == sorted([q.numel(), k.numel(), v.numel(), out.numel(), B * N * 24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_score_matrix_is_ever_formed(dtype: torch.dtype) -> None:
    """One of 1024 x 1024 over two ranks would have B x N x 512 x 1024 elements on each."""
    length = 1024
    q, k, v = inputs(length, dtype=dtype)
    weight = torch.randn(B, N, length, E).to(dtype)
    with Shapes() as shapes:
        over_ranks(q, k, v, None, weight, 2, 0.3)
    assert shapes.largest <= B * N * length * (D + E)
