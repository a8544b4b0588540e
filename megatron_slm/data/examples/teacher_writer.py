"""What a teacher says of examples to the files of one split, which :mod:`megatron_slm.data.examples.teacher` maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_slm.data.examples.teacher import DOCUMENT_COLUMNS, DOCUMENTS_NAME, LABEL_COLUMNS, TEACHER_VERSION
from megatron_slm.data.examples.writer import write_batch
from megatron_slm.data.preparation.staging import writing
from megatron_slm.data.shards import INDEX_NAME, token_dtype, write_json

SHARD_NUMBERS = 1 << 25
"""Log-probabilities of a full shard: 128 MiB, and at most as much again for their ids."""

_TYPES = {"shard": pa.int32(), "start": pa.int64(), "labels": pa.int64()}


class TeacherWriter:
    """Writes one split into an existing, empty directory; :meth:`finish` writes ``index.json`` last.

    Args:
        facts: copied into the index: ``top_k``, ``temperature``, ``examples_digest``, ``tokenizer_hash``,
            ``vocab_size``.
    """

    def __init__(self, directory: Path, facts: dict[str, Any], shard_numbers: int = SHARD_NUMBERS) -> None:
        self.directory, self._facts = directory, facts
        self._top_k: int = facts["top_k"]
        self._dtype = token_dtype(facts["vocab_size"])
        self._shard_labels = max(1, shard_numbers // self._top_k)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self._documents: dict[str, list[int]] = {name: [] for name in DOCUMENT_COLUMNS}
        self._shards: list[dict[str, Any]] = []
        self._covered = 0.0

    def add(self, ids: np.ndarray, logprobs: np.ndarray, rest: np.ndarray) -> None:
        """Append a document: [labels, K] twice, and [labels]."""
        labels = len(rest)
        if self._num_pending and self._num_pending + labels > self._shard_labels:
            self._flush()
        for name, value in zip(DOCUMENT_COLUMNS, (len(self._shards), self._num_pending, labels), strict=True):
            self._documents[name].append(value)
        self._pending.append((ids, logprobs, rest))
        self._num_pending += labels
        self._covered += float(-np.expm1(rest.astype(np.float64)).sum())

    def finish(self) -> dict[str, Any]:
        """Write what is left and the index, which is returned."""
        if self._pending:
            self._flush()
        columns = [pa.array(self._documents[name], type=_TYPES[name]) for name in DOCUMENT_COLUMNS]
        labels = sum(self._documents["labels"])
        with writing(self.directory):
            documents = write_batch(
                self.directory / DOCUMENTS_NAME, pa.record_batch(columns, names=list(DOCUMENT_COLUMNS))
            )
            index = {
                "teacher_version": TEACHER_VERSION,
                **self._facts,
                "num_documents": len(self._documents["labels"]),
                "num_labels": labels,
                "covered": self._covered / labels if labels else 1.0,
                "documents": documents,
                "shards": self._shards,
            }
            write_json(self.directory / INDEX_NAME, index)
        return index

    def _flush(self) -> None:
        ids, logprobs, rest = (np.concatenate(column) for column in zip(*self._pending, strict=True))
        columns = [
            self._table(ids.astype(self._dtype)),
            self._table(logprobs.astype(np.float32)),
            pa.array(rest.astype(np.float32)),
        ]
        path = self.directory / f"shard-{len(self._shards):05d}.arrow"
        with writing(path):
            self._shards.append(write_batch(path, pa.record_batch(columns, names=list(LABEL_COLUMNS))))
        self._pending, self._num_pending = [], 0

    def _table(self, values: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self._top_k)
