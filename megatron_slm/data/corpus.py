"""A prepared split, memory-mapped: tokens by position, without reading what is not asked for."""

from __future__ import annotations

import bisect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_slm.data.shards import COLUMN, INDEX_NAME, SCHEMA_VERSION, ContentDigest, file_sha256
from megatron_slm.errors import DataError

REMEDY = "Run `mslm data prepare` again into a new directory, or copy the corpus anew."

HASH_LIMIT_BYTES = 4 << 30
"""Up to this size a corpus is hashed before it is read: seconds, against results from damaged tokens."""


class Corpus:
    """The token stream of one split. Made by :meth:`open`; safe to share between threads and to inherit by fork."""

    def __init__(self, directory: Path, index: dict[str, Any], shards: list[np.ndarray]) -> None:
        self.directory = directory
        self.num_tokens: int = index["num_tokens"]
        self.num_documents: int = index["num_documents"]
        self.digest: str = index["digest"]
        self.tokenizer_hash: str = index["tokenizer_hash"]
        self.vocab_size: int = index["vocab_size"]
        self.eod_id: int = index["eod_id"]
        self.sources: list[dict[str, Any]] = index["sources"]
        self.shard_files: list[str] = [shard["file"] for shard in index["shards"]]
        self._num_bytes: int = sum(shard["bytes"] for shard in index["shards"])
        self._shards = shards
        self._starts = list(itertools.accumulate((len(shard) for shard in shards), initial=0))

    @staticmethod
    def open(directory: str | Path, verify: str = "size") -> Corpus:
        """Map the split in ``directory`` (``<data_path>/train`` or ``<data_path>/valid``).

        Args:
            verify: "size" compares every shard's length with the index (no data is read); "hash" also compares every
                shard's sha256 and the digest of the whole stream.

        Raises:
            DataError: something is missing or damaged; the message names the file.
        """
        assert verify in ("size", "hash"), f"verify is size or hash, not {verify}"
        root = Path(directory)
        index = read_index(root / INDEX_NAME)
        try:
            shards = [map_shard(root / shard["file"], shard, index["dtype"], verify) for shard in index["shards"]]
            corpus = Corpus(root, index, shards)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{root / INDEX_NAME} is damaged: {error!r} is missing or of a wrong type. {REMEDY}"
            ) from error
        if corpus._starts[-1] != corpus.num_tokens:
            raise DataError(
                f"{root / INDEX_NAME} promises {corpus.num_tokens} tokens, but its shards hold "
                f"{corpus._starts[-1]}. {REMEDY}"
            )
        if verify == "hash":
            corpus.verify_digest(np.dtype(index["dtype"]))
        return corpus

    @property
    def num_bytes(self) -> int:
        """Bytes of all shard files together, as the index promises them and :meth:`open` has found them."""
        return self._num_bytes

    def num_samples(self, seq_length: int) -> int:
        """Samples of ``seq_length`` tokens in one epoch. The last label of a sample is the next one's first token, so
        the stream needs one token more than its samples; what remains at the end is not used.
        """
        return max(0, (self.num_tokens - 1) // seq_length)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] in the stored type; read-only, a view of the file unless they span two shards.

        Raises:
            IndexError: the range is not inside the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop} are not inside a stream of {self.num_tokens}")
        if start == stop:
            return self._shards[0][:0] if self._shards else np.empty(0, dtype=np.uint16)
        first, last = self._shard_range(start, stop)
        parts = []
        for number in range(first, last + 1):
            offset = self._starts[number]
            parts.append(self._shards[number][max(0, start - offset) : stop - offset])
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        joined.flags.writeable = False
        return joined

    def sample(self, index: int, seq_length: int) -> np.ndarray:
        """Tokens [seq_length + 1] of a sample: its inputs and the last label."""
        return self.tokens(index * seq_length, (index + 1) * seq_length + 1)

    def files_of(self, start: int, stop: int) -> list[str]:
        """Names of the shards that hold tokens ``start`` .. ``stop`` (not included)."""
        if start >= stop:
            return []
        first, last = self._shard_range(start, stop)
        return self.shard_files[first : last + 1]

    def _shard_range(self, start: int, stop: int) -> tuple[int, int]:
        return bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop) - 1

    def verify_digest(self, dtype: np.dtype[Any]) -> None:
        """Compare the whole stream with the digest that the index promises.

        Raises:
            DataError: they differ.
        """
        content = ContentDigest(
            dtype=dtype, vocab_size=self.vocab_size, eod_id=self.eod_id, tokenizer_hash=self.tokenizer_hash
        )
        for shard in self._shards:
            content.update(shard)
        if content.hexdigest() != self.digest:
            raise DataError(
                f"{self.directory / INDEX_NAME} promises the digest {self.digest}, but its shards have "
                f"{content.hexdigest()}: the index was changed. {REMEDY}"
            )


def read_index(path: Path) -> dict[str, Any]:
    """What ``index.json`` says of a split.

    Raises:
        DataError: it is missing or damaged, or of another version.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: {path.parent} is not a prepared split. "
            "Give the directory that `mslm data prepare` wrote."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). {REMEDY}") from error
    version = index.get("schema_version") if isinstance(index, dict) else None
    if isinstance(index, dict) and "examples_version" in index:
        raise DataError(
            f"{path.parent} holds compiled examples and no corpus of text: stages after pretraining read them, and "
            "`mslm data show` describes them."
        )
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} has schema_version {version}, but this program reads {SCHEMA_VERSION}. {REMEDY}")
    checked: dict[str, Any] = index
    return checked


def map_shard(path: Path, facts: dict[str, Any], dtype: str, verify: str) -> np.ndarray:
    """Tokens [n] of one shard, read-only, as a view of the file.

    Args:
        facts: what the index says of the shard.
        verify: as of :meth:`Corpus.open`.

    Raises:
        DataError: the file is missing, damaged or another one.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes != facts["bytes"]:
            raise DataError(f"{path} has {num_bytes} bytes, but the index promises {facts['bytes']}. {REMEDY}")
        if verify == "hash":
            found = file_sha256(path)
            if found != facts["sha256"]:
                raise DataError(
                    f"{path} is damaged: sha256 {found}, but the index promises {facts['sha256']}. {REMEDY}"
                )
        with pa.memory_map(str(path), "r") as source:
            column = pa.ipc.open_file(source).get_batch(0).column(COLUMN)
        tokens: np.ndarray = column.to_numpy(zero_copy_only=True)
    except FileNotFoundError as error:
        raise DataError(f"The shard {path} is missing. {REMEDY}") from error
    except OSError as error:
        raise DataError(f"Cannot map the shard {path}: {error}. {REMEDY}") from error
    except (pa.ArrowException, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}. {REMEDY}") from error
    if tokens.dtype != np.dtype(dtype) or len(tokens) != facts["num_tokens"]:
        raise DataError(
            f"{path} holds {len(tokens)} tokens of {tokens.dtype}, but the index promises {facts['num_tokens']} of "
            f"{dtype}. {REMEDY}"
        )
    return tokens
