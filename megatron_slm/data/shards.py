"""One split on disk: a flat stream of tokens in Arrow IPC files beside an ``index.json`` that describes them.

Every shard holds a single record batch with the column ``tokens`` (uint16 up to a vocabulary of 65,536, else int32), so
that a memory map of the file *is* the array. The stream is the documents one after another, each ended by the
end-of-document token; nothing in it depends on the sequence length, which is chosen when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1
COLUMN = "tokens"
DEFAULT_SHARD_TOKENS = 1 << 26
"""Tokens of one full shard: 128 MiB at two bytes."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type of the two that holds every id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


class ContentDigest:
    """The identity of a token stream: what it says, not how it is cut into shards."""

    def __init__(self, *, dtype: np.dtype[Any], vocab_size: int, eod_id: int, tokenizer_hash: str) -> None:
        header = {"dtype": dtype.name, "vocab_size": vocab_size, "eod_id": eod_id, "tokenizer_hash": tokenizer_hash}
        self._little_endian = dtype.newbyteorder("<")
        self._hash = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + b"\n")

    def update(self, tokens: np.ndarray) -> None:
        """Append ``tokens`` [n]."""
        self._hash.update(np.ascontiguousarray(tokens, dtype=self._little_endian).data)

    def hexdigest(self) -> str:
        """sha256 of the header and of all tokens so far."""
        return self._hash.hexdigest()


class ShardWriter:
    """Writes one split into an existing, empty directory; a context manager that writes ``index.json`` last.

    Args:
        directory: where ``shard-00000.arrow`` ... and ``index.json`` go.
        shard_tokens: tokens of a full shard.
        sources: copied into the index.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        eod_id: int,
        tokenizer_hash: str,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        sources: Sequence[dict[str, Any]] = (),
    ) -> None:
        assert shard_tokens > 0, "a shard holds at least one token"
        self.directory = directory
        self.index: dict[str, Any] = {}
        self._dtype = token_dtype(vocab_size)
        self._vocab_size, self._eod_id = vocab_size, eod_id
        self._facts = {"vocab_size": vocab_size, "eod_id": eod_id, "tokenizer_hash": tokenizer_hash}
        self._digest = ContentDigest(
            dtype=self._dtype, vocab_size=vocab_size, eod_id=eod_id, tokenizer_hash=tokenizer_hash
        )
        self._sources = list(sources)
        self._shard_tokens = shard_tokens
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._num_documents = 0
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document; the end-of-document token is added here.

        Raises:
            ValueError: an id lies outside the vocabulary, or is the end-of-document token.
        """
        tokens = np.empty(len(ids) + 1, dtype=np.int64)
        tokens[:-1] = ids
        tokens[-1] = self._eod_id
        body = tokens[:-1]
        if len(body) and (body.min() < 0 or body.max() >= self._vocab_size):
            raise ValueError(f"its ids {body.min()}..{body.max()} are not inside the vocabulary of {self._vocab_size}")
        if (body == self._eod_id).any():
            raise ValueError(f"it holds the end-of-document token {self._eod_id} inside its text")
        self._num_documents += 1
        self._append(tokens.astype(self._dtype))

    def _append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            part = tokens[: self._shard_tokens - self._num_pending]
            self._pending.append(part)
            self._num_pending += len(part)
            tokens = tokens[len(part) :]
            if self._num_pending == self._shard_tokens:
                self._flush()

    def _flush(self) -> None:
        tokens = np.concatenate(self._pending)
        self._pending, self._num_pending = [], 0
        self._digest.update(tokens)
        path = self.directory / f"shard-{len(self._shards):05d}.arrow"
        batch = pa.record_batch([pa.array(tokens)], names=[COLUMN])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        size, digest = path.stat().st_size, file_sha256(path)
        self._shards.append({"file": path.name, "num_tokens": len(tokens), "bytes": size, "sha256": digest})

    def _finish(self) -> None:
        if self._num_pending:
            self._flush()
        self.index = {
            "schema_version": SCHEMA_VERSION,
            "dtype": self._dtype.name,
            **self._facts,
            "num_documents": self._num_documents,
            "num_tokens": sum(shard["num_tokens"] for shard in self._shards),
            "digest": self._digest.hexdigest(),
            "shards": self._shards,
            "sources": self._sources,
        }
        write_json(self.directory / INDEX_NAME, self.index)


def file_sha256(path: Path) -> str:
    """Hash of a file of any size, read in pieces (``hashlib.file_digest`` needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as a person would read it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
