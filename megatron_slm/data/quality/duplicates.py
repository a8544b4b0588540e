"""Documents that come twice: equal texts by hash, similar ones by MinHash-LSH (Leskovec et al., "Mining of Massive
Datasets", chapter 3): signatures that agree in a band are candidates, and their estimated similarity decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.screen import Screened
from megatron_slm.data.quality.signature import NUM_PERMUTATIONS, empty_sketch

CANDIDATE_PROBABILITY = 0.98
"""With it at least, a pair whose similarity is the threshold is a candidate; more similar ones nearly always are."""


class Duplicates:
    """The documents seen so far. Asked in document order, by one process, it gives the same answers every time.

    Memory: about 150 bytes a document for exact duplicates, and 6 kB a kept one for near duplicates at 0.8.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._threshold = config.near_duplicates
        self._first: dict[str, int] = {}
        self._signatures: dict[int, np.ndarray] = {}
        self._index: Any = None
        if self._threshold is not None:
            from datasketch import MinHashLSH

            self._sketch = empty_sketch()
            self._index = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=bands_and_rows(self._threshold))

    def original(self, document: int, screened: Screened) -> tuple[int, str] | None:
        """The earlier document that ``document`` repeats, and how: "exact", the first of this text; "near", the first
        kept one that is similar enough. None when ``document`` is kept.
        """
        assert screened.reason is None, f"document {document} was dropped by the screen and repeats nothing"
        if screened.key is not None:
            first = self._first.setdefault(screened.key, document)
            if first != document:
                return first, "exact"
        if self._index is None or screened.signature is None:
            return None
        similar = self._similar(screened.signature)
        if similar is not None:
            return similar, "near"
        self._signatures[document] = screened.signature
        self._index.insert(document, self._sketch, check_duplication=False)
        return None

    def _similar(self, signature: np.ndarray) -> int | None:
        self._sketch.hashvalues = signature
        for candidate in sorted(self._index.query(self._sketch)):
            if np.mean(self._signatures[candidate] == signature) >= self._threshold:
                return int(candidate)
        return None


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """The cut of a signature into bands of the most rows, so with the fewest candidates in vain, that proposes a pair
    of similarity ``threshold`` with :data:`CANDIDATE_PROBABILITY`: 1 - (1 - threshold^rows)^bands.
    """
    cuts = [(NUM_PERMUTATIONS // rows, rows) for rows in range(1, NUM_PERMUTATIONS // 2 + 1)]
    return max(
        (cut for cut in cuts if 1.0 - (1.0 - threshold ** cut[1]) ** cut[0] >= CANDIDATE_PROBABILITY),
        key=lambda cut: cut[1],
        default=cuts[0],
    )
