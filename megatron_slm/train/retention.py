"""Which checkpoints of a run stay. No torch.

Those of the newest ``keep_last`` saves, and those of steps that are a multiple of ``save_retain_interval``. The newest
one always stays: it has just been hashed file by file and is on the disk, and every file must be there in its size
before an earlier one is removed. Those of later steps than the newest save (a run that has gone back leaves them) are
neither counted nor removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.train import manifest, publish


@dataclass(frozen=True)
class Retention:
    """``checkpoint.keep_last`` (None keeps all) and ``checkpoint.save_retain_interval``."""

    keep_last: int | None = None
    interval: int | None = None

    def reasons(self, steps: Iterable[int], newest: int) -> dict[int, str]:
        """Step -> why its checkpoint stays; a step that is not in it goes.

        Args:
            steps: of all published checkpoints.
            newest: the last save's, which the tracker names.
        """
        past = sorted((step for step in steps if step <= newest), reverse=True)
        kept = {step: f"later than step {newest}" for step in steps if step > newest}
        for rank, step in enumerate(past):
            if step == newest:
                kept[step] = "newest"
            elif self.keep_last is None:
                kept[step] = "all are kept"
            elif rank < self.keep_last:
                kept[step] = f"keep_last={self.keep_last}"
            elif self.interval is not None and step % self.interval == 0:
                kept[step] = f"save_retain_interval={self.interval}"
        return kept

    def apply(self, checkpoints_dir: Path, newest: int) -> None:
        """Remove what need not stay, oldest first. Nothing goes while the newest is not whole."""
        there = publish.published(checkpoints_dir)
        kept = self.reasons(there, newest)
        superfluous = [path for step, path in there.items() if step not in kept]
        if superfluous and newest in there and not manifest.problems(there[newest], hashes=False):
            for path in superfluous:
                publish.remove(path)
