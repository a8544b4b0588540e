"""The estimator of the gradient noise scale against a model whose noise scale is known in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_slm.train.noise_scale import Average, Estimate, estimate

DIMENSIONS, DEVIATION = 10, 0.5


def regression(samples: int, generator: torch.Generator) -> torch.Tensor:
    """Gradients [20,000, samples, DIMENSIONS] of half the squared error of y = x w* + e, at w = w* + delta.

    For x ~ N(0, I) and e ~ N(0, s^2) a sample's gradient (x delta - e) x has the mean delta and the covariance's trace
    (d + 1) |delta|^2 + s^2 d.
    """
    shape = (20_000, samples, DIMENSIONS)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = DEVIATION * torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    return ((x @ delta()) - noise)[..., None] * x


def delta() -> torch.Tensor:
    return torch.linspace(0.1, 1.0, DIMENSIONS, dtype=torch.float64)


@pytest.mark.parametrize("nested", [True, False])
def test_estimates_are_unbiased(nested: bool) -> None:
    """Also when the small batch is a part of the big one, as in training."""
    generator = torch.Generator().manual_seed(0)
    big = regression(16, generator)
    small = big[:, :4] if nested else regression(4, generator)
    squares = [batch.mean(dim=1).square().sum(dim=1).tolist() for batch in (small, big)]
    found = [estimate((4, a), (16, b)) for a, b in zip(*squares, strict=True)]
    mean = Estimate(*(sum(column) / len(found) for column in zip(*found, strict=True)))
    squared = float(delta().square().sum())
    trace = (DIMENSIONS + 1) * squared + DEVIATION**2 * DIMENSIONS
    assert mean.gradient_squared == pytest.approx(squared, rel=0.02)
    assert mean.trace == pytest.approx(trace, rel=0.04)
    assert mean.noise_scale == pytest.approx(trace / squared, rel=0.05)


def test_the_average_is_not_pulled_to_zero_and_survives_a_checkpoint() -> None:
    average, other = Average(None), Average(None)
    for _ in range(3):
        average.add(Estimate(2.0, 30.0))
        other = Average(json.loads(json.dumps(other.record)))
        other.add(Estimate(2.0, 30.0))
    assert average.estimate() == pytest.approx((2.0, 30.0)) and average.estimate().noise_scale == pytest.approx(15.0)
    assert other.record == average.record


def test_both_are_averaged_before_they_are_divided() -> None:
    average = Average(None)
    for trace, squared in ((10.0, 1.0), (10.0, -0.5), (10.0, 2.5)):
        average.add(Estimate(squared, trace))
    assert average.estimate().noise_scale == pytest.approx(10.0, rel=0.1)


def test_a_gradient_that_drowns_in_noise_has_no_scale() -> None:
    assert math.isnan(Estimate(-1.0, 5.0).noise_scale) and math.isnan(Estimate(0.0, 5.0).noise_scale)
