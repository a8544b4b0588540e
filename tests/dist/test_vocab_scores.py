"""Scores and divergences of a divided vocabulary against their definitions over the whole one, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED, TEACHER_HIDDEN = 37, 16, 100, 128, 24
FORMATS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def problem(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(TOKENS, HIDDEN),
        "weight": normal(PADDED, HIDDEN),
        "labels": torch.randint(0, VOCAB, (TOKENS, 3), generator=generator),
        "counts": (torch.rand(TOKENS, generator=generator) < 0.7).float(),
        "upstream": normal(6, TOKENS),
        "teacher_hidden": normal(TOKENS, TEACHER_HIDDEN),
        "teacher_weight": normal(PADDED, TEACHER_HIDDEN) * 0.5,
    }


def kept_ids(labels: Tensor) -> Tensor:
    """Of every third token the whole vocabulary, of the others eight ids with the first label among them."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.stack([torch.randperm(VOCAB, generator=generator)[:8] for _ in labels])
    kept[:, 0] = labels[:, 0]
    kept[::2, -2:] = -1
    kept[::3] = -1
    return kept


def scores_on_rank(dtype: torch.dtype, chunk: int, labels: int, temperature: float, keep: bool) -> Any:
    import torch.distributed as dist

    from megatron_slm.parallel import vocab_scores

    given = problem(dtype)
    vocab_scores.CHUNK_TOKENS = chunk
    rows = PADDED // dist.get_world_size()
    hidden = given["hidden"].requires_grad_()
    hidden.data[given["counts"] == 0] = float("nan")  # what does not count is not read
    mine = given["weight"][dist.get_rank() * rows :][:rows].clone().requires_grad_()
    wanted = given["labels"][:, 0] if labels == 1 else given["labels"][:, :labels]
    scores = vocab_scores.vocab_parallel_scores(
        hidden,
        mine,
        wanted,
        given["counts"],
        group=dist.group.WORLD,
        vocabulary=vocab_scores.Vocabulary(VOCAB, temperature),
        kept=kept_ids(given["labels"]) if keep else None,
    )
    (scores[:-1] * given["upstream"][: labels + 1]).sum().backward()
    assert hidden.grad is not None and mine.grad is not None
    dist.all_reduce(hidden.grad)
    return scores.detach(), hidden.grad, mine.grad


def scores_expected(labels: int, temperature: float, keep: bool, dtype: torch.dtype) -> Any:
    given = {name: x.double() if x.is_floating_point() else x for name, x in problem(dtype).items()}
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    logits = hidden @ weight[:VOCAB].t() / temperature
    if keep:
        allowed = torch.zeros(TOKENS, VOCAB, dtype=torch.bool)
        for row, ids in enumerate(kept_ids(given["labels"])):
            allowed[row, ids[ids >= 0] if (ids >= 0).any() else slice(None)] = True
        logits = logits.masked_fill(~allowed, -1e30)
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=-1)
    wanted = given["labels"][:, :labels]
    likeliest = (logits.argmax(dim=-1) == wanted[:, 0]).double()
    scores = torch.cat([log_p.gather(1, wanted).t(), entropy[None], likeliest[None]])
    scores = torch.where(given["counts"] != 0, scores, 0.0)
    (scores[:-1] * given["upstream"][: labels + 1]).sum().backward()
    return scores.detach(), hidden.grad, weight.grad


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def compare(results: list[Any], expected: Any, tolerance: float) -> None:
    for scores, hidden_gradient, _ in results:
        close(scores, expected[0], tolerance)
        close(hidden_gradient, expected[1], tolerance)
    weight_gradient = torch.cat([rows for _, _, rows in results])
    close(weight_gradient, expected[2], tolerance)
    assert weight_gradient[VOCAB:].count_nonzero() == 0, "padding rows have no gradient"


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("chunk", "labels", "temperature"), [(5, 1, 1.0), (1024, 1, 0.7), (5, 3, 1.0)])
def test_scores_equal_a_log_softmax_over_the_whole_vocabulary(
    world_size: int, chunk: int, labels: int, temperature: float, precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    results = run_ranks(scores_on_rank, world_size, dtype, chunk, labels, temperature, False)
    compare(results, scores_expected(labels, temperature, False, dtype), tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
def test_within_a_kept_set_the_others_have_no_probability(world_size: int) -> None:
    results = run_ranks(scores_on_rank, world_size, torch.float64, 5, 1, 0.8, True)
    compare(results, scores_expected(1, 0.8, True, torch.float64), 1e-12)


def nothing_counts() -> list[Tensor]:
    import torch.distributed as dist

    from megatron_slm.parallel.vocab_divergence import Teacher, vocab_parallel_divergence
    from megatron_slm.parallel.vocab_scores import Vocabulary, vocab_parallel_scores

    hidden = torch.full((4, 8), float("nan"), requires_grad=True)
    weight = torch.ones(10, 8, requires_grad=True)
    arguments: Any = (hidden, weight, torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    options: Any = {"group": dist.group.WORLD, "vocabulary": Vocabulary(10)}
    scores = vocab_parallel_scores(*arguments, **options)
    divergence = vocab_parallel_divergence(*arguments, teacher=Teacher(hidden, weight), beta=0.5, **options)
    (scores.sum() + divergence.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [scores.detach(), divergence.detach(), hidden.grad, weight.grad]


def test_a_batch_in_which_nothing_counts_gives_exact_zeros_whatever_it_holds() -> None:
    for found in run_ranks(nothing_counts, 1)[0]:
        assert found.count_nonzero() == 0


def collectives_of_a_chunk() -> tuple[int, int]:
    import torch.distributed as dist

    from megatron_slm.parallel import vocab_scores

    counted = 0
    real = dist.all_reduce

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal counted
        counted += 1
        return real(*arguments, **options)

    dist.all_reduce = count
    given = problem(torch.float32)
    hidden = given["hidden"].requires_grad_()
    scores = vocab_scores.vocab_parallel_scores(
        hidden,
        given["weight"][dist.get_rank() * 64 :][:64],
        given["labels"][:, 0],
        torch.ones(TOKENS),
        group=dist.group.WORLD,
        vocabulary=vocab_scores.Vocabulary(VOCAB),
    )
    forward = counted
    scores.sum().backward()
    return forward, counted - forward


def test_two_collectives_a_chunk_and_none_backwards() -> None:
    assert run_ranks(collectives_of_a_chunk, 2) == [(4, 0)] * 2  # two chunks: never more than half of the tokens


def divergence_on_rank(dtype: torch.dtype, chunk: int, beta: float) -> Any:
    import torch.distributed as dist

    from megatron_slm.parallel import vocab_divergence, vocab_scores

    vocab_scores.CHUNK_TOKENS = chunk
    given = problem(dtype)
    rows = PADDED // dist.get_world_size()
    part = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    hidden, mine = given["hidden"].requires_grad_(), given["weight"][part].clone().requires_grad_()
    values = vocab_divergence.vocab_parallel_divergence(
        hidden,
        mine,
        given["labels"][:, 0],
        given["counts"],
        teacher=vocab_divergence.Teacher(given["teacher_hidden"], given["teacher_weight"][part]),
        beta=beta,
        group=dist.group.WORLD,
        vocabulary=vocab_scores.Vocabulary(VOCAB, 1.5),
    )
    (values[:2] * given["upstream"][:2]).sum().backward()
    assert hidden.grad is not None and mine.grad is not None
    dist.all_reduce(hidden.grad)
    return values.detach(), hidden.grad, mine.grad


def divergence_expected(beta: float, dtype: torch.dtype) -> Any:
    given = {name: x.double() if x.is_floating_point() else x for name, x in problem(dtype).items()}
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    log_q = (hidden @ weight[:VOCAB].t() / 1.5).log_softmax(dim=-1)
    log_p = (given["teacher_hidden"] @ given["teacher_weight"][:VOCAB].t() / 1.5).log_softmax(dim=-1)
    q, p = log_q.exp(), log_p.exp()
    forward, reverse = (p * (log_p - log_q)).sum(dim=-1), (q * (log_q - log_p)).sum(dim=-1)
    log_m = (beta * p + (1 - beta) * q).log()
    jsd = beta * (p * (log_p - log_m)).sum(dim=-1) + (1 - beta) * (q * (log_q - log_m)).sum(dim=-1)
    divergence = forward if beta == 0 else reverse if beta == 1 else jsd
    logprob = log_q.gather(1, given["labels"][:, :1])[:, 0]
    entropy = -(q * log_q).sum(dim=-1)
    agreement = (q.argmax(dim=-1) == p.argmax(dim=-1)).double()
    values = torch.where(
        given["counts"] != 0, torch.stack([divergence, logprob, forward, reverse, entropy, agreement]), 0.0
    )
    (values[:2] * given["upstream"][:2]).sum().backward()
    return values.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_equal_their_definition(world_size: int, beta: float, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    results = run_ranks(divergence_on_rank, world_size, dtype, 5, beta)
    compare(results, divergence_expected(beta, dtype), tolerance)


def self_divergence(beta: float) -> Tensor:
    import torch.distributed as dist

    from megatron_slm.parallel.vocab_divergence import DIVERGENCE, Teacher, vocab_parallel_divergence
    from megatron_slm.parallel.vocab_scores import Vocabulary

    given = problem(torch.float64)
    values = vocab_parallel_divergence(
        given["hidden"],
        given["weight"],
        given["labels"][:, 0],
        given["counts"],
        teacher=Teacher(given["hidden"], given["weight"]),
        beta=beta,
        group=dist.group.WORLD,
        vocabulary=Vocabulary(VOCAB),
    )
    return values[DIVERGENCE]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_model_is_at_no_distance_from_itself(beta: float) -> None:
    assert run_ranks(self_divergence, 1, beta)[0].abs().max() < 1e-14
