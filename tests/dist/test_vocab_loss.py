"""The vocabulary-parallel loss against torch's cross-entropy over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED = 37, 16, 100, 128


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) < 0.7).float()
    return hidden.to(dtype), weight.to(dtype), labels, mask


def on_rank(dtype: torch.dtype, chunk: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's loss, summed gradient of the hidden states and gradient of its rows."""
    import torch.distributed as dist

    from megatron_slm.parallel import vocab_loss

    vocab_loss.CHUNK_TOKENS = chunk
    hidden, weight, labels, mask = problem(dtype)
    rows = PADDED // dist.get_world_size()
    hidden.requires_grad_()
    mine = weight[dist.get_rank() * rows :][:rows].clone().requires_grad_()
    loss = vocab_loss.vocab_parallel_loss(hidden, mine, labels, mask, group=dist.group.WORLD, vocab_size=VOCAB)
    (loss * scale).backward()
    gradient = hidden.grad
    assert gradient is not None and mine.grad is not None
    dist.all_reduce(gradient)
    return loss.detach(), gradient, mine.grad


def reference(dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, labels, mask = (x.double() if x.is_floating_point() else x for x in problem(dtype))
    hidden.requires_grad_(), weight.requires_grad_()
    losses = torch.nn.functional.cross_entropy(hidden @ weight[:VOCAB].t(), labels, reduction="none")
    loss = (losses * mask).sum()
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_equals_cross_entropy_over_the_whole_vocabulary(
    world_size: int, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    results = run_ranks(on_rank, world_size, dtype, chunk, 0.25)
    expected = reference(dtype, 0.25)
    weight_gradient = torch.cat([rows for _, _, rows in results])
    for loss, hidden_gradient, _ in results:
        for a, b in ((loss, expected[0]), (hidden_gradient, expected[1]), (weight_gradient, expected[2])):
            assert (a.double() - b).norm() <= tolerance * b.norm()
    assert weight_gradient[VOCAB:].count_nonzero() == 0, "padding rows have no gradient"


def largest_tensor_on_rank(tokens: int, vocab: int) -> int:
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_slm.parallel.vocab_loss import vocab_parallel_loss

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    with Largest():
        vocab_parallel_loss(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), group=dist.group.WORLD, vocab_size=vocab
        ).backward()
    return Largest.size


@pytest.mark.parametrize("tokens", [512, 4096])
def test_full_logits_never_exist(tokens: int) -> None:
    largest = run_ranks(largest_tensor_on_rank, 1, tokens, 1000)[0]
    assert largest <= min(1024, tokens // 2) * 1000
