"""What an earlier run has trained on, as a source of samples for another run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_slm.data.batch import Samples
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.order import SampleOrder


@dataclass(frozen=True)
class ReplayedSamples:
    """The samples of a run, numbered as it trained on them; those it passed over are left out.

    Args:
        corpora: of the earlier run, by source.
        cursor: where the earlier run stood.
    """

    corpora: Mapping[str, Samples]
    cursor: Cursor

    @property
    def eod_id(self) -> int:
        """The end-of-document token, the same in all corpora of a run."""
        return next(iter(self.corpora.values())).eod_id

    @property
    def num_samples(self) -> int:
        """Samples that were trained on, repeated ones as often as they were."""
        return self.cursor.consumed_samples - self.cursor.skipped_samples

    @property
    def digest(self) -> str:
        """Of what was trained on: equal for two checkpoints only if the same samples came in the same order."""
        return hashlib.sha256(f"replay {self.num_samples} {self.cursor.rolling_digest}".encode()).hexdigest()

    def order(self, seed: int) -> SampleOrder:
        """The order in which they come again, epoch after epoch."""
        return SampleOrder(self.num_samples, seed, self.digest, self.cursor.seq_length)

    def position(self, index: int) -> int:
        """Where in the earlier run its trained sample number ``index`` was read."""
        position = index
        for start, stop in self.cursor.skipped:
            if start <= position:
                position += stop - start
        return position

    def sample(self, index: int, seq_length: int) -> np.ndarray:
        """Tokens [seq_length + 1] of trained sample ``index``."""
        found = self.cursor.order.sample_id(self.position(index))
        return self.corpora[found.source].sample(found.index, seq_length)
