"""Which sample of a corpus comes when: a keyed permutation of every epoch, computed and never stored.

Position ``p`` counts the samples of this corpus consumed since the start of training. Its epoch is
``p // num_samples``, and inside the epoch the sample is the image of ``p % num_samples`` under a permutation that is a
pure function of (seed, epoch, dataset digest, sequence length). The target length of the run, the ranks, the
micro-batch and the workers do not enter.

The permutation is a Feistel network on the smallest even power of two that holds ``num_samples``, walked along its
cycle until it falls inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). All of it is
integer arithmetic modulo 2**64, so it is the same on every platform, and O(1) for any position.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_slm.errors import DataError

ORDER_VERSION = 1
"""Raised when the same inputs would give another permutation; part of every key."""

ROUNDS = 8
SMALLEST_HALF_BITS = 3
"""With halves of 2 bits the permutations of 5 samples come up measurably unevenly; with 3 they do not."""

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class SampleOrder:
    """The order of one corpus at one sequence length.

    Args:
        num_samples: samples of one epoch, ``Corpus.num_samples(seq_length)``.
        seed: ``data.data_seed``.
        digest: ``Corpus.digest``.
        seq_length: tokens of one sample.

    Raises:
        DataError: the corpus has not one sample of this length.
    """

    num_samples: int
    seed: int
    digest: str
    seq_length: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"The corpus is too short for one sample of seq_length {self.seq_length} (it needs one token "
                "more). Give more text or lower model.seq_length."
            )

    def sample_id(self, position: int) -> tuple[int, int]:
        """Epoch and index of the sample at ``position`` (0, 1, 2, ... over all epochs)."""
        assert position >= 0, f"position {position} is before the start of training"
        epoch, offset = divmod(position, self.num_samples)
        half = _half_bits(self.num_samples)
        keys = _round_keys(self, epoch)
        index = _permute(offset, half, keys)
        while index >= self.num_samples:
            index = _permute(index, half, keys)
        return epoch, index

    def sample_ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices, both int64 [stop - start], of a range of positions; equals :meth:`sample_id` of each."""
        assert 0 <= start <= stop, f"positions {start}..{stop} are not a range"
        epochs = np.arange(start, stop, dtype=np.int64) // self.num_samples
        indices = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            count = min(stop - position, self.num_samples - offset)
            values = np.arange(offset, offset + count, dtype=np.uint64)
            indices[position - start : position - start + count] = self._permute_inside(values, epoch)
            position += count
        return epochs, indices

    def _permute_inside(self, values: np.ndarray, epoch: int) -> np.ndarray:
        half = _half_bits(self.num_samples)
        keys = _round_keys(self, epoch)
        values = _permute_array(values, half, keys)
        while len(outside := np.flatnonzero(values >= self.num_samples)):
            values[outside] = _permute_array(values[outside], half, keys)
        return values.astype(np.int64)


def _half_bits(num_samples: int) -> int:
    """Bits of one half of the Feistel network: its domain is less than 4 x ``num_samples`` (or 64)."""
    return max(SMALLEST_HALF_BITS, -(-(num_samples - 1).bit_length() // 2))


@functools.lru_cache(maxsize=16)
def _round_keys(order: SampleOrder, epoch: int) -> tuple[int, ...]:
    message = f"{order.seed} {epoch} {order.digest} {order.seq_length} {order.num_samples}".encode()
    key = hashlib.blake2b(message, digest_size=8 * ROUNDS, person=b"mslm order %d" % ORDER_VERSION).digest()
    return tuple(int.from_bytes(key[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _permute(value: int, half: int, keys: tuple[int, ...]) -> int:
    """One pass of the network over ``2 * half`` bits. The round function is splitmix64's output mix (Steele, Lea and
    Flood, OOPSLA 2014) of half plus key, of which the upper bits are taken.
    """
    left, right = value >> half, value & ((1 << half) - 1)
    for key in keys:
        mixed = (right + key) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * _MULTIPLIERS[0]) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * _MULTIPLIERS[1]) & _MASK
        mixed ^= mixed >> 31
        left, right = right, left ^ (mixed >> (64 - half))
    return (left << half) | right


def _permute_array(values: np.ndarray, half: int, keys: tuple[int, ...]) -> np.ndarray:
    """:meth:`_permute` of each of ``values`` [n], uint64, whose arithmetic wraps as the mask does."""
    shift, top = np.uint64(half), np.uint64(64 - half)
    left, right = values >> shift, values & np.uint64((1 << half) - 1)
    for key in keys:
        mixed = right + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
        mixed ^= mixed >> np.uint64(31)
        left, right = right, left ^ (mixed >> top)
    return np.asarray((left << shift) | right)
