"""The vocabulary-parallel loss against its definition, written out over the whole vocabulary in float64."""

from __future__ import annotations

from typing import Any

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


def on_rank(
    dtype: torch.dtype, chunk: int, scale: float, terms: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's sums [3], summed gradient of the hidden states and gradient of its rows."""
    import torch.distributed as dist

    from megatron_slm.parallel import vocab_loss

    vocab_loss.CHUNK_TOKENS = chunk
    hidden, weight, labels, mask = problem(dtype)
    rows = PADDED // dist.get_world_size()
    hidden.requires_grad_()
    mine = weight[dist.get_rank() * rows :][:rows].clone().requires_grad_()
    objective = vocab_loss.Objective(VOCAB, *terms)
    sums = vocab_loss.vocab_parallel_loss(hidden, mine, labels, mask, group=dist.group.WORLD, objective=objective)
    (sums[vocab_loss.OBJECTIVE] * scale).backward()
    gradient = hidden.grad
    assert gradient is not None and mine.grad is not None
    dist.all_reduce(gradient)
    return sums.detach(), gradient, mine.grad


def reference(
    dtype: torch.dtype, scale: float, terms: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, smoothing = terms
    hidden, weight, labels, mask = (x.double() if x.is_floating_point() else x for x in problem(dtype))
    hidden.requires_grad_(), weight.requires_grad_()
    log_p = (hidden @ weight[:VOCAB].t()).log_softmax(dim=-1)
    cross_entropy = -log_p.gather(1, labels[:, None])[:, 0]
    squared = (hidden @ weight[:VOCAB].t()).logsumexp(dim=-1) ** 2
    objective = (1 - smoothing) * cross_entropy + smoothing * (-log_p).mean(dim=-1) + z * squared
    sums = torch.stack([(each * mask).sum() for each in (objective, cross_entropy, squared)])
    (sums[0] * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return sums.detach(), hidden.grad, weight.grad


PLAIN = (0.0, 0.0)
TERMS = {"plain": PLAIN, "z": (1e-2, 0.0), "smoothing": (0.0, 0.1), "both": (1e-2, 0.1)}
FORMATS = [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def check(world_size: int, chunk: int, terms: str, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    results = run_ranks(on_rank, world_size, dtype, chunk, 0.25, TERMS[terms])
    expected = reference(dtype, 0.25, TERMS[terms])
    weight_gradient = torch.cat([rows for _, _, rows in results])
    for sums, hidden_gradient, _ in results:
        for a, b in zip(sums.double(), expected[0], strict=True):
            assert (a - b).abs() <= tolerance * b.abs()
        for a, b in ((hidden_gradient, expected[1]), (weight_gradient, expected[2])):
            assert (a.double() - b).norm() <= tolerance * b.norm()
        masked = problem(dtype)[3] == 0
        assert masked.any() and hidden_gradient[masked].count_nonzero() == 0, "masked tokens have no gradient"
    assert weight_gradient[VOCAB:].count_nonzero() == 0, "padding rows have no gradient"


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_equals_cross_entropy_over_the_whole_vocabulary(
    world_size: int, chunk: int, precision: tuple[torch.dtype, float]
) -> None:
    check(world_size, chunk, "plain", precision)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("terms", ["z", "smoothing", "both"])
def test_z_loss_and_label_smoothing_equal_their_definition(
    world_size: int, terms: str, precision: tuple[torch.dtype, float]
) -> None:
    check(world_size, 5, terms, precision)


def test_without_terms_the_objective_is_the_cross_entropy_to_the_last_bit() -> None:
    for sums, _, _ in run_ranks(on_rank, 4, torch.float32, 5, 1.0, PLAIN):
        assert sums[0] == sums[1]


def gradients_are_exact() -> bool:
    import torch.distributed as dist

    from megatron_slm.parallel.vocab_loss import Objective, vocab_parallel_loss

    hidden, weight, labels, mask = (x[:6] if x.shape[0] == TOKENS else x for x in problem(torch.float64))

    def minimised(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        objective = Objective(6, 0.3, 0.2)
        return vocab_parallel_loss(hidden, weight, labels % 6, mask, group=dist.group.WORLD, objective=objective)[0]

    checked: bool = torch.autograd.gradcheck(minimised, (hidden.requires_grad_(), weight[:8].requires_grad_()))
    return checked


def test_gradcheck() -> None:
    assert run_ranks(gradients_are_exact, 1)[0]


def collectives_on_rank(terms: tuple[float, float]) -> int:
    import torch.distributed as dist

    calls = 0
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    on_rank(torch.float32, 1024, 1.0, terms)
    return calls


def test_the_terms_add_no_exchange() -> None:
    """Two chunks with two collectives each, and the sum of the hidden states' gradient."""
    for terms in (PLAIN, TERMS["both"]):
        assert run_ranks(collectives_on_rank, 2, terms) == [5, 5]


def largest_tensor_on_rank(tokens: int, vocab: int, terms: tuple[float, float]) -> int:
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_slm.parallel.vocab_loss import Objective, vocab_parallel_loss

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    labels, mask = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    objective = Objective(vocab, *terms)
    with Largest():
        sums = vocab_parallel_loss(hidden, weight, labels, mask, group=dist.group.WORLD, objective=objective)
        sums[0].backward()
    return Largest.size


@pytest.mark.parametrize("terms", ["plain", "both"])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_full_logits_never_exist(tokens: int, terms: str) -> None:
    largest = run_ranks(largest_tensor_on_rank, 1, tokens, 1000, TERMS[terms])[0]
    assert largest <= min(1024, tokens // 2) * 1000
