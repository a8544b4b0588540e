"""What duplicates are recognised by: a hash of the text, and a signature of its set of word 5-grams.

The share of equal values in two signatures of 128 minima estimates the Jaccard index of the two sets (Broder 1997, "On
the resemblance and containment of documents"), with a standard deviation of sqrt(J (1 - J) / 128): 0.035 at J = 0.8.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import numpy as np

from megatron_slm.data.quality.words import ngrams, words

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
SIGNATURE_SEED = 1


def exact_key(text: str) -> str:
    """128-bit hash (hex) of ``text`` in Unicode NFC, each run of white space as one space, none at the ends. Case and
    punctuation count.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(plain.encode(), digest_size=16, person=b"mslm duplicates").hexdigest()


class Signer:
    """Texts to signatures. Needs datasketch."""

    def __init__(self) -> None:
        self._empty = empty_sketch()

    def __call__(self, text: str) -> np.ndarray | None:
        """Signature [128] of ``text``, or None when it holds no word."""
        shingles = set(ngrams(words(text), SHINGLE_WORDS))
        if not shingles:
            return None
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        signature: np.ndarray = sketch.hashvalues
        return signature


def empty_sketch() -> Any:
    """A ``datasketch.MinHash`` of no shingle, which every signature begins as."""
    from datasketch import MinHash

    return MinHash(num_perm=NUM_PERMUTATIONS, seed=SIGNATURE_SEED)
