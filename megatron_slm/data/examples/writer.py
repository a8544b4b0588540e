"""Documents to the files of one split, which :mod:`megatron_slm.data.examples.store` maps again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_slm.data.examples.encoding import Encoded
from megatron_slm.data.examples.store import (
    DOCUMENT_COLUMNS,
    DOCUMENTS_NAME,
    EXAMPLES_VERSION,
    ROLES,
    STREAM_COLUMNS,
    ExampleDigest,
)
from megatron_slm.data.shards import INDEX_NAME, file_sha256, token_dtype, write_json

_TYPES = {
    "shard": pa.int32(), "start": pa.int64(), "length": pa.int64(), "number": pa.int64(), "source": pa.int32(),
    "margin": pa.float32(), "score": pa.float32(), "fields": pa.large_string(),
}  # fmt: skip


class SplitWriter:
    """Writes one split into an existing, empty directory; :meth:`finish` writes ``index.json`` last.

    Args:
        facts: copied into the index: ``kind``, ``vocab_size``, ``eod_id``, ``tokenizer_hash``, ``template_sha256``,
            ``sources``.
    """

    def __init__(self, directory: Path, facts: dict[str, Any], shard_tokens: int) -> None:
        self.directory, self._facts, self._shard_tokens = directory, facts, shard_tokens
        self._dtype = token_dtype(facts["vocab_size"])
        self._digest = ExampleDigest(facts)
        self._pending: list[Encoded] = []
        self._num_pending = 0
        self._documents: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
        self._shards: list[dict[str, Any]] = []
        self._by_role: Counter[str] = Counter()
        self._trained: Counter[str] = Counter()

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._documents["length"])

    def add(
        self, documents: Sequence[Encoded], *, number: int, source: int, margin: float, score: float | None, fields: str
    ) -> None:
        """Append the documents of one row."""
        for document in documents:
            length = len(document.tokens)
            if self._num_pending and self._num_pending + length > self._shard_tokens:
                self._flush()
            values = (len(self._shards), self._num_pending, length, number, source, margin, score, fields)
            for name, value in zip(DOCUMENT_COLUMNS, values, strict=True):
                self._documents[name].append(np.nan if value is None else value)
            self._pending.append(document)
            self._num_pending += length
            self._digest.update(document.tokens, document.weights, margin, fields)
            for role, name in enumerate(ROLES):
                mine = document.roles == role
                self._by_role[name] += int(mine.sum())
                self._trained[name] += int((document.weights[1:][mine[1:]] != 0.0).sum())

    def finish(self) -> dict[str, Any]:
        """Write what is left and the index, which is returned."""
        if self._pending:
            self._flush()
        columns = [pa.array(self._documents[name], type=_TYPES[name]) for name in DOCUMENT_COLUMNS]
        documents = write_batch(self.directory / DOCUMENTS_NAME, pa.record_batch(columns, names=list(DOCUMENT_COLUMNS)))
        lengths = self._documents["length"]
        index = {
            "examples_version": EXAMPLES_VERSION,
            "dtype": self._dtype.name,
            **self._facts,
            "num_documents": len(lengths),
            "num_tokens": sum(lengths),
            "longest": max(lengths, default=0),
            "tokens_by_role": dict(self._by_role),
            "trained_by_role": dict(self._trained),
            "digest": self._digest.hexdigest(),
            "documents": documents,
            "shards": self._shards,
        }
        write_json(self.directory / INDEX_NAME, index)
        return index

    def _flush(self) -> None:
        columns = [
            np.concatenate([one.tokens for one in self._pending]).astype(self._dtype),
            np.concatenate([one.weights for one in self._pending]).astype(np.float32),
            np.concatenate([one.roles for one in self._pending]).astype(np.uint8),
        ]
        path = self.directory / f"shard-{len(self._shards):05d}.arrow"
        batch = pa.record_batch([pa.array(column) for column in columns], names=list(STREAM_COLUMNS))
        self._shards.append({**write_batch(path, batch), "num_tokens": self._num_pending})
        self._pending, self._num_pending = [], 0


def write_batch(path: Path, batch: Any) -> dict[str, Any]:
    """Write one record batch; what an index says of its file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
