"""Best fit decreasing, by counting: the rows of the plain algorithm, at once for a million lengths."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_slm.data.examples.packing import best_fit_decreasing, one_a_row


def plain(lengths: list[int], seq_length: int) -> list[int]:
    """Room left in the rows of the textbook's algorithm."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, row) for row, left in enumerate(room) if left >= length]
        if not fitting:
            room.append(seq_length)
        room[min(fitting)[1] if fitting else -1] -= length
    return sorted(room)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_the_plain_algorithm(seed: int) -> None:
    random = np.random.default_rng(seed)
    seq_length = int(random.integers(4, 70))
    lengths = random.integers(1, seq_length + 1, int(random.integers(1, 120)))
    packing = best_fit_decreasing(lengths, seq_length)
    assert sorted(packing.items.tolist()) == list(range(len(lengths))), "every item is in one row"
    left = [seq_length - int(lengths[packing.row(row)].sum()) for row in range(packing.num_rows)]
    assert sorted(left) == plain(lengths.tolist(), seq_length)
    assert packing.efficiency == pytest.approx(lengths.sum() / (packing.num_rows * seq_length))


def test_the_same_lengths_give_the_same_rows_and_long_items_come_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, 20_000)
    one, other = best_fit_decreasing(lengths, 512), best_fit_decreasing(lengths, 512)
    assert np.array_equal(one.items, other.items) and np.array_equal(one.starts, other.starts)
    assert one.efficiency > 0.99
    assert all((np.diff(lengths[one.row(row)]) <= 0).all() for row in range(100))


def test_nothing_and_one_a_row() -> None:
    assert best_fit_decreasing(np.empty(0, np.int64), 8).num_rows == 0
    packing = one_a_row(np.array([3, 1]), 4)
    assert [packing.row(row).tolist() for row in range(packing.num_rows)] == [[0], [1]]
    assert packing.efficiency == 0.5
