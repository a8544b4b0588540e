"""The sampler: Philox against its published answers, draws against their distribution, kept sets, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.rollout.philox import philox, uniforms
from megatron_slm.rollout.sampling import Drawn, Sampling, draw

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0, -4.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """Known answers of Random123's kat_vectors."""
    assert philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0].tolist() == list(words)


def numbers(seed: int = 1, step: int = 2, samples: range = range(1), position: int = 0) -> np.ndarray:
    drawn = np.array(samples, dtype=np.int64)
    return uniforms(seed, step, drawn, np.full_like(drawn, position))


def test_a_number_depends_on_each_of_its_four_causes_and_on_nothing_else() -> None:
    base = numbers()[0]
    others = [numbers(seed=3), numbers(seed=1 + (1 << 40)), numbers(step=1), numbers(position=1)]
    others += [numbers(samples=range(1, 2)), numbers(samples=range(1 << 40, (1 << 40) + 1))]
    assert len({base, *(float(one[0]) for one in others)}) == 7
    many = numbers(samples=range(1000))
    assert many[0] == base and many[700] == numbers(samples=range(700, 701))[0]
    assert (many >= 0).all() and (many < 1).all() and abs(many.mean() - 0.5) < 0.03


def drawn(sampling: Sampling, count: int = 1) -> Drawn:
    samples = np.arange(count)
    points = torch.from_numpy(uniforms(sampling.seed, 0, samples, np.zeros_like(samples)))
    return draw(LOGITS.expand(count, -1), points, sampling)


def reference(sampling: Sampling) -> np.ndarray:
    """Probabilities, written out with sets."""
    weights = np.exp(LOGITS.double().numpy() / sampling.temperature)
    falling = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = set(falling)
    if sampling.top_k:
        kept = {token for token in kept if weights[token] >= weights[falling[sampling.top_k - 1]]}
    mass, inside = 0.0, sum(weights[token] for token in kept)
    nucleus = set()
    for token in (token for token in falling if token in kept):
        if mass < sampling.top_p:
            nucleus.add(token)
        mass += weights[token] / inside
    nucleus |= {token for token in kept if weights[token] in {weights[other] for other in nucleus}}
    chosen = np.array([weights[token] if token in nucleus else 0.0 for token in range(len(weights))])
    return chosen / chosen.sum()


SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=2.5),
    "top-k": Sampling(top_k=3),
    "top-k with a tie": Sampling(top_k=4),
    "top-p": Sampling(top_p=0.8, temperature=1.3),
    "both": Sampling(top_k=5, top_p=0.7, temperature=0.9),
    "all kept": Sampling(top_k=8),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_follow_their_distribution(name: str) -> None:
    """Chi-square over 40,000 draws, and the log-probabilities that are told with them."""
    sampling, count = SAMPLINGS[name], 40_000
    result, expected = drawn(sampling, count), reference(SAMPLINGS[name])
    observed = np.bincount(result.tokens.numpy(), minlength=len(LOGITS))
    assert observed[expected == 0].sum() == 0, "what is cut away is never drawn"
    likely = expected > 0
    statistic = ((observed - count * expected)[likely] ** 2 / (count * expected[likely])).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), (observed / count, expected)
    np.testing.assert_allclose(result.logprobs.numpy(), np.log(expected[result.tokens.numpy()]), atol=1e-12)
    raw = torch.log_softmax(LOGITS.double(), dim=-1)[result.tokens]
    np.testing.assert_allclose(result.raw_logprobs.numpy(), raw.numpy(), atol=1e-12)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_kept_set_gives_the_distribution_back(name: str) -> None:
    """Training renormalises over the kept ids; that must be what was drawn from."""
    sampling = SAMPLINGS[name]
    result, expected = drawn(sampling, 2), reference(sampling)
    if not sampling.cuts:
        assert result.kept is None
        return
    assert result.kept is not None
    for ids in result.kept:
        assert ids.dtype == np.int32 and sorted(ids) == list(ids) == np.flatnonzero(expected).tolist()
        again = torch.log_softmax(LOGITS.double()[torch.from_numpy(ids).long()] / sampling.temperature, dim=-1)
        np.testing.assert_allclose(again.exp().numpy(), expected[ids], atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-3])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    result = drawn(Sampling(temperature=temperature), 50)
    assert result.tokens.tolist() == [4] * 50 and not result.logprobs.any()
    if temperature == 0.0:
        assert result.kept is not None and [ids.tolist() for ids in result.kept] == [[4]] * 50


def test_the_ends_of_the_line_are_tokens_that_can_be_drawn() -> None:
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    for point, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 2.0**-53, 2)):
        assert draw(logits, torch.tensor([point], dtype=torch.float64), Sampling()).tokens.item() == token


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_draw_nothing(value: float, temperature: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[1, 3] = value
    tokens = draw(logits, torch.full((2,), 0.4, dtype=torch.float64), Sampling(temperature=temperature)).tokens
    assert tokens[0] >= 0 and tokens[1] == -1


def test_rows_are_drawn_apart() -> None:
    """The same numbers, whatever else is in the batch."""
    generator = torch.Generator().manual_seed(0)
    logits, points = torch.randn(6, 300, generator=generator), torch.rand(6, generator=generator).double()
    for sampling in SAMPLINGS.values():
        together = draw(logits, points, sampling)
        for row in range(6):
            alone = draw(logits[row : row + 1], points[row : row + 1], sampling)
            assert alone.tokens == together.tokens[row] and alone.logprobs == together.logprobs[row]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} {value} "):
        Sampling(**wrong)  # type: ignore[arg-type]
