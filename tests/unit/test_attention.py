"""Our attention against the definition: softmax over the allowed keys, written out in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.parallel.attention import SelfAttentionCore

S, B, N, G, D = 48, 2, 4, 2, 8


def attention(dropout: float = 0.0) -> SelfAttentionCore:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=dropout, kv_channels=D)
    return SelfAttentionCore(config, 1, None, "self")


def inputs(groups: int = G, length: int = S, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, B, N, D), (length, B, groups, D), (length, B, groups, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def documents() -> torch.Tensor:
    ids = torch.zeros(B, S, dtype=torch.int64)
    ids[0, 10:], ids[0, 11:] = 1, 2  # a document of one token
    ids[1, 30:] = 1
    return ids


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / math.sqrt(D)
    length = q.shape[0]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None].expand(B, -1, -1)
    if ids is not None:
        allowed = allowed & (ids[:, :, None] == ids[:, None, :])
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).reshape(length, B, -1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, G, N])
def test_forward_and_gradients_follow_the_definition(groups: int, packed: bool) -> None:
    tensors, ids = inputs(groups), documents() if packed else None
    found, expected = attention()(*tensors, ids), by_definition(*tensors, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, dtype=found.dtype)
    for a, b in zip(
        torch.autograd.grad(found, tensors, weight), torch.autograd.grad(expected, tensors, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_never_see_another_document() -> None:
    q, k, v = inputs()
    ids = documents()
    before = attention()(q, k, v, ids)
    with torch.no_grad():
        v[:10, 0] += 100.0  # the first document of the first sample
    after = attention()(q, k, v, ids)
    assert after[10:, 0].equal(before[10:, 0]) and not after[:10, 0].equal(before[:10, 0])


class Shapes(TorchDispatchMode):
    """Records the number of elements of the largest tensor any op made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_score_matrix_is_ever_formed(dtype: torch.dtype, dropout: float) -> None:
    """At S = 1024 the scores would have B x N x S x S = 8.4M elements; nothing comes near it, backward included."""
    length = 1024
    tensors = inputs(length=length, dtype=dtype)
    module = attention(dropout)
    with Shapes() as shapes:
        module(*tensors, None).sum().backward()
    assert shapes.largest <= B * N * length * 128 + 1


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    tensors = inputs()
    module = attention(0.5)
    torch.manual_seed(0)
    mean = torch.stack([module(*tensors, None).detach() for _ in range(2000)]).mean(dim=0)
    expected = by_definition(*tensors, None).detach()
    assert (mean - expected).abs().mean() < 0.05 * expected.abs().mean()
    module.eval()
    torch.testing.assert_close(module(*tensors, None), expected, rtol=1e-12, atol=1e-12)


def test_dropout_gradients_are_those_of_the_same_mask() -> None:
    """The blocks are recomputed in the backward pass: they must draw the mask of the forward pass again."""
    q, k, v = inputs()
    module = attention(0.5)

    def value(shift: float) -> torch.Tensor:
        torch.manual_seed(5)
        return module(q, k, v + shift, None).sum()

    torch.manual_seed(5)
    (gradient,) = torch.autograd.grad(module(q, k, v, None).sum(), v)
    numeric = (value(1e-4) - value(-1e-4)) / 2e-4
    torch.testing.assert_close(gradient.sum(), numeric.detach(), rtol=1e-6, atol=1e-6)
