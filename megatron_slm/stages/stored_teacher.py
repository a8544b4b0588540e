"""A stored teacher: what `mslm data teacher` wrote goes with the micro-batches, and no second model runs.

Shapes: B micro-batch, S sequence, K tokens of the teacher that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_slm.data.corpus import HASH_LIMIT_BYTES
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.examples.teacher import TeacherStore
from megatron_slm.errors import DataError
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages.config import DistillConfig

IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"


class StoredTeacher:
    """Completes micro-batches with the teacher's most probable tokens.

    Args:
        own: names the directory, and how many of its tokens are compared.
        sources: of "train" and "valid", by name.
        trained: ``data.train_on``.

    Raises:
        DataError: what is stored is of other examples, at another temperature, of fewer tokens, or not there; or a
            source, or a label that is trained on, has no teacher.
    """

    def __init__(self, own: DistillConfig, sources: Mapping[str, Mapping[str, Any]], trained: str) -> None:
        assert own.distill_teacher is not None and own.teacher_topk is not None, "config/rules_stage.py asks for both"
        if trained == "all":
            raise DataError(
                f"data.train_on = all trains on every token, but the stored teacher {own.distill_teacher} has spoken "
                "where the examples train alone. Leave data.train_on out, or let the teacher run (no teacher_topk)."
            )
        self._top_k = own.teacher_topk
        self._sources = sources
        self._stores: dict[str, dict[str, TeacherStore]] = {
            split: {name: _opened(own, split, name, rows) for name, rows in named.items()}
            for split, named in sources.items()
        }

    def complete(self, batches: list[Batch], rows: Sequence[Sequence[tuple[str, int]]], split: str = "train") -> None:
        """Add ``teacher_ids`` int64 and ``teacher_logprobs`` float32 [B, S, K] to whole micro-batches, on the host.

        Args:
            rows: of each micro-batch, source and number of its rows; what it has beyond them is padding.
            split: "train" or "valid".
        """
        for batch, numbers in zip(batches, rows, strict=True):
            shape = (*batch["labels"].shape, self._top_k)
            ids, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
            for place, (name, index) in enumerate(numbers):
                self._fill(ids[place], logprobs[place], self._stores[split][name], self._sources[split][name], index)
            batch[IDS], batch[LOGPROBS] = torch.from_numpy(ids), torch.from_numpy(logprobs)

    def _fill(self, ids: np.ndarray, logprobs: np.ndarray, said: TeacherStore, rows: ExampleRows, index: int) -> None:
        """Row ``index`` into [S, K]."""
        start = 0
        for number in rows.documents(index):
            weights = rows.store.weights(number)
            slots = start + np.flatnonzero(weights[1:])
            ids[slots] = said.ids(number)[:, : self._top_k]
            logprobs[slots] = said.logprobs(number)[:, : self._top_k]
            start += len(weights) - 1


def _opened(own: DistillConfig, split: str, name: str, rows: Any) -> TeacherStore:
    """What is stored of one split of a source."""
    if not isinstance(rows, ExampleRows):
        raise DataError(
            f"The source {name} is text, of which no teacher is stored. Leave it out, or let the teacher run (no "
            "distill.teacher_topk)."
        )
    directory = Path(str(own.distill_teacher), split)
    said = TeacherStore.open(directory, "hash" if _num_bytes(directory) <= HASH_LIMIT_BYTES else "size")
    said.require_examples(rows.store)
    if said.temperature != own.distill_temperature:
        raise DataError(
            f"{said.directory} was stored at the temperature {said.temperature}, but distill.distill_temperature is "
            f"{own.distill_temperature}. Set the latter, or run `mslm data teacher --temperature "
            f"{own.distill_temperature}`."
        )
    if own.teacher_topk is not None and own.teacher_topk > said.top_k:
        raise DataError(
            f"{said.directory} holds {said.top_k} tokens a label, but distill.teacher_topk is {own.teacher_topk}. "
            f"Lower the latter, or run `mslm data teacher --top-k {own.teacher_topk}`."
        )
    return said


def _num_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.arrow"))
