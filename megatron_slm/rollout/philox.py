"""Random numbers that are a function of what they are for: Philox4x32-10 (Salmon et al., SC 2011, section 3.3).

A counter is turned into a number without any state. So a draw depends on (seed, step, sample, position) alone: not on
the ranks, not on the batch, and not on how many draws were made before it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""32-bit words, each in an element of 64 bits: numpy has no multiplication of two words that keeps the upper half."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """counter [4, n] and key, all below 2^32 -> four random words of each, [4, n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> _WORD) ^ c1 ^ np.uint64(k0), second & _LOW
        c2, c3 = (first >> _WORD) ^ c3 ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, step: int, samples: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number of [0, 1) for each (sample, position) of a step, with 53 random bits: [n].

    Args:
        seed: 64 bits of it are used.
        step: 32 bits of it are used.
        samples, positions: [n], not negative; 64 and 32 bits are used.
    """
    sample = samples.astype(np.uint64)
    counter = np.stack(
        [
            np.full_like(sample, step & 0xFFFFFFFF),
            sample & _LOW,
            sample >> _WORD,
            positions.astype(np.uint64) & _LOW,
        ]
    )
    high, low, *_ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits = (high << _WORD | low) >> np.uint64(11)
    drawn: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return drawn
