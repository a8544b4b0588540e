"""The order is a permutation per epoch, looks random, never changes, and costs the same at any position."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import DataError


def order(num_samples: int, seed: int = 1234, digest: str = "d", seq_length: int = 8) -> SampleOrder:
    return SampleOrder(num_samples, seed, digest, seq_length)


def epoch_of(sample_order: SampleOrder, epoch: int) -> np.ndarray:
    n = sample_order.num_samples
    epochs, indices = sample_order.sample_ids(epoch * n, (epoch + 1) * n)
    assert (epochs == epoch).all()
    return indices


def test_frozen_values() -> None:
    """A change here changes every user's order: raise ORDER_VERSION with it."""
    assert order(10).sample_ids(0, 20)[1].tolist() == FROZEN_SMALL
    assert [order(10**12).sample_id(position)[1] for position in (0, 1, 10**12 - 1)] == FROZEN_LARGE


FROZEN_SMALL = [9, 3, 4, 5, 7, 6, 8, 2, 1, 0, 6, 0, 1, 4, 5, 9, 2, 7, 3, 8]
FROZEN_LARGE = [119942371743, 732222344518, 893424745356]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65_537])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_is_a_permutation(num_samples: int, epoch: int) -> None:
    assert sorted(epoch_of(order(num_samples), epoch).tolist()) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [1, 3, 100, 4097, 10**9 + 7, 2**40 + 1, 2**61 + 3])
def test_scalar_and_vector_agree(num_samples: int) -> None:
    sample_order = order(num_samples)
    for start in (0, num_samples - 1, 3 * num_samples - 2):
        epochs, indices = sample_order.sample_ids(start, start + 6)
        scalar = [sample_order.sample_id(position) for position in range(start, start + 6)]
        assert scalar == list(zip(epochs.tolist(), indices.tolist(), strict=True))
        assert all(0 <= index < num_samples for _, index in scalar)


def test_empty_range() -> None:
    assert [len(part) for part in order(10).sample_ids(4, 4)] == [0, 0]


def test_every_part_of_the_key_changes_the_order() -> None:
    reference = epoch_of(order(1000), 0)
    others = [
        epoch_of(order(1000), 1),
        epoch_of(order(1000, seed=1235), 0),
        epoch_of(order(1000, digest="e"), 0),
        epoch_of(order(1000, seq_length=9), 0),
        epoch_of(order(1001), 0)[:1000],
    ]
    for other in others:
        # Two random permutations share about one place (Poisson with mean 1).
        assert (reference == other).sum() < 10


@pytest.mark.parametrize("num_samples", [3, 4, 5])
def test_small_orders_reach_every_permutation_equally(num_samples: int) -> None:
    kinds = math.factorial(num_samples)
    positions = range(num_samples)
    sample_order = order(num_samples)
    counts = Counter(
        tuple(sample_order.sample_id(epoch * num_samples + position)[1] for position in positions)
        for epoch in range(60 * kinds)
    )
    assert set(counts) == set(itertools.permutations(positions))
    assert chi_square(np.array(list(counts.values()))) < 6


@pytest.mark.parametrize("num_samples", [200, 1000, 5000])
def test_large_orders_look_random(num_samples: int) -> None:
    sample_order = order(num_samples)
    fixed, rising, cells = 0, 0, np.zeros((16, 16))
    steps = np.zeros(16)
    epochs = 100_000 // num_samples
    for epoch in range(epochs):
        indices = epoch_of(sample_order, epoch)
        fixed += int((indices == np.arange(num_samples)).sum())
        rising += int((np.diff(indices) == 1).sum())
        bucket = indices * 16 // num_samples
        np.add.at(cells, (np.arange(num_samples) * 16 // num_samples, bucket), 1)
        np.add.at(steps, np.diff(indices) % num_samples * 16 // num_samples, 1)
    # Both counts are Poisson with mean of about 1 an epoch.
    assert abs(fixed - epochs) < 6 * math.sqrt(epochs)
    assert abs(rising - epochs) < 6 * math.sqrt(epochs)
    share = np.bincount(np.arange(num_samples) * 16 // num_samples) / num_samples
    assert chi_square(cells.ravel(), np.outer(share, share).ravel()) < 6
    first = np.bincount(np.arange(1, num_samples) * 16 // num_samples, minlength=16)
    assert chi_square(steps, first / first.sum()) < 6


def chi_square(counts: np.ndarray, share: np.ndarray | None = None) -> float:
    """Distance of counts from their expectation in standard deviations of the chi-square distribution."""
    expected = counts.sum() * (np.full(len(counts), 1 / len(counts)) if share is None else share)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_positions_far_out_in_a_huge_order_are_distinct_and_spread() -> None:
    sample_order = order(2**42 + 1)  # The worst size: the domain is almost four times as large.
    indices = sample_order.sample_ids(10**12, 10**12 + 10_000)[1]
    assert len(set(indices.tolist())) == 10_000
    assert indices.max() > 0.99 * 2**42 and indices.min() < 0.01 * 2**42


def test_a_corpus_without_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match="too short for one sample of seq_length 8"):
        order(0)
