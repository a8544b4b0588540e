"""Megatron's token files, ``PREFIX.bin`` and ``PREFIX.idx``, written and read.

``.bin`` is the ids of all sequences, one after another. ``.idx``, little-endian: the magic ``MMIDIDX`` and two zeros,
version (u64), code of the ids' type (u8), number of sequences (u64), number of documents + 1 (u64); then for each
sequence its length (i32) and the byte it begins at (i64), and for each document the sequence it begins at (i64), with
the number of sequences as the last. A document of Megatron's preprocessing is one sequence, or one a sentence.

Source: ``megatron/core/datasets/indexed_dataset.py`` of megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.shards import token_dtype
from megatron_slm.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEAD = struct.Struct("<9sQBQQ")

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Type of the ids by its code. Core also numbers 6 (float64) and 7 (float32), which hold no ids."""

EXPORT_TOKENS = 1 << 20
"""Tokens that an export reads at once."""

REMEDY = "Copy both files anew."


@dataclass(frozen=True)
class Index:
    """What ``PREFIX.idx`` says. Made by :func:`read_index`, which has checked it against ``PREFIX.bin``."""

    dtype: np.dtype[Any]
    lengths: np.ndarray
    """[sequences] int32: ids of each sequence."""
    documents: np.ndarray
    """[documents + 1] int64: first sequence of each document, and the number of sequences."""

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def prefix_of(path: Path) -> Path | None:
    """PREFIX, when ``path`` is ``PREFIX.bin``, ``PREFIX.idx`` or a PREFIX of both files; else None."""
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    return path if not path.exists() and all(file.is_file() for file in files_of(path)) else None


def files_of(prefix: Path) -> tuple[Path, Path]:
    """``PREFIX.idx`` and ``PREFIX.bin``."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def read_index(prefix: str | Path) -> Index:
    """The index of ``PREFIX``.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """
    index_path, bin_path = files_of(Path(prefix))
    try:
        content, num_bytes = index_path.read_bytes(), bin_path.stat().st_size
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}. Both .idx and .bin are needed.") from error
    if len(content) < HEAD.size or not content.startswith(MAGIC):
        raise DataError(f"{index_path} is no index of Megatron's: it does not begin with MMIDIDX. {REMEDY}")
    _, version, code, num_sequences, num_bounds = HEAD.unpack_from(content)
    if version != VERSION or code not in DTYPES:
        raise DataError(
            f"{index_path} has version {version} and type code {code}, but version {VERSION} is read, and token ids "
            f"have a code among {', '.join(map(str, DTYPES))}. {REMEDY}"
        )
    wanted = HEAD.size + 12 * num_sequences + 8 * num_bounds
    if len(content) == wanted + num_sequences and num_sequences:
        raise DataError(f"{index_path} is of a multimodal dataset, with a mode for each sequence: it is not text.")
    if len(content) != wanted:
        raise DataError(
            f"{index_path} has {len(content)} bytes, but its head promises {num_sequences} sequences and {num_bounds} "
            f"bounds of documents, which are {wanted} bytes. {REMEDY}"
        )
    lengths = np.frombuffer(content, "<i4", num_sequences, HEAD.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEAD.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_bounds, HEAD.size + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * DTYPES[code].itemsize
    total = int(ends[-1]) if num_sequences else 0
    consistent = (
        not (lengths < 0).any()
        and np.array_equal(pointers, np.concatenate([[0], ends])[:num_sequences])
        and num_bounds > 0
        and documents[0] == 0
        and documents[-1] == num_sequences
        and not (np.diff(documents) < 0).any()
    )
    if not consistent:
        raise DataError(f"{index_path} is damaged: its lengths, places and documents contradict each other. {REMEDY}")
    if total != num_bytes:
        raise DataError(f"{bin_path} has {num_bytes} bytes, but {index_path} promises {total}. {REMEDY}")
    return Index(DTYPES[code], lengths, documents)


def read(prefix: str | Path) -> Iterator[np.ndarray]:
    """The documents of ``PREFIX`` in order, each [n] ids in the stored type; n may be 0.

    Raises:
        DataError: as :func:`read_index`.
    """
    index = read_index(prefix)
    bin_path = files_of(Path(prefix))[1]
    bounds = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.documents]
    try:
        # Not memory-mapped: where a file is cut off meanwhile, a map kills the process.
        with bin_path.open("rb") as file:
            for length in np.diff(bounds).tolist():
                yield _read_ids(file, length, index.dtype, bin_path)
    except OSError as error:
        raise DataError(f"Cannot read {bin_path}: {error.strerror}.") from error


def _read_ids(file: BinaryIO, length: int, dtype: np.dtype[Any], path: Path) -> np.ndarray:
    content = file.read(length * dtype.itemsize)
    if len(content) != length * dtype.itemsize:
        raise DataError(f"{path} was cut off while it was read. {REMEDY}")
    return np.frombuffer(content, dtype)


class IndexedWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``; a context manager at whose end both appear, or neither.

    Args:
        dtype: stored type of the ids, one of :data:`DTYPES`; Megatron's own choices are uint16 and int32.

    Raises:
        DataError: one of the files exists, or cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self._code = next(code for code, known in DTYPES.items() if known == dtype)
        self._dtype = DTYPES[self._code]
        self._targets = files_of(Path(prefix))
        for target in self._targets:
            if os.path.lexists(target):
                raise DataError(f"{target} exists. Choose another prefix, or remove it yourself.")
        self._partial = tuple(target.with_name(f".{target.name}.partial") for target in self._targets)
        self._lengths = array("i")
        self._documents = array("q", [0])

    def __enter__(self) -> IndexedWriter:
        try:
            self._bin = self._partial[1].open("wb")
        except OSError as error:
            raise self._refused(error) from error
        return self

    def add_document(self, ids: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            ids: [n] all its ids, the end-of-document token included if it shall have one.
            lengths: ids of each of its sequences, n together; default one sequence.

        Raises:
            DataError: an id does not fit into the type, or nothing can be written.
            ValueError: ``lengths`` are not n together.
        """
        tokens = np.asarray(ids, dtype=None if len(ids) else self._dtype)
        limits = np.iinfo(self._dtype)
        if len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise DataError(
                f"Document {len(self._documents) - 1} holds the ids {tokens.min()}..{tokens.max()}, which do not fit "
                f"into {self._dtype.name}. Write a wider type."
            )
        lengths = [len(tokens)] if lengths is None else lengths
        if sum(lengths) != len(tokens):
            raise ValueError(f"sequences of {sum(lengths)} ids do not make a document of {len(tokens)}")
        try:
            self._bin.write(tokens.astype(self._dtype).tobytes())
        except OSError as error:
            raise self._refused(error) from error
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise self._refused(error) from error
        finally:
            # After a failed write, closing tries to write once more.
            with contextlib.suppress(OSError):
                self._bin.close()
            for path in self._partial:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._sync(self._bin)
        lengths = np.asarray(self._lengths, dtype="<i4")
        places = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")[:-1] * self._dtype.itemsize])[: len(lengths)]
        with self._partial[0].open("wb") as file:
            file.write(HEAD.pack(MAGIC, VERSION, self._code, len(lengths), len(self._documents)))
            for numbers in (lengths, places.astype("<i8"), np.asarray(self._documents, dtype="<i8")):
                file.write(numbers.tobytes())
            self._sync(file)
        # The index last: where it is, the ids are complete.
        for partial, target in reversed(list(zip(self._partial, self._targets, strict=True))):
            os.rename(partial, target)

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def _refused(self, error: OSError) -> DataError:
        return DataError(
            f"Cannot write {self._targets[1]} and .idx: {error.strerror}. Nothing was kept; choose another place."
        )


def export(corpus: Corpus, prefix: str | Path) -> None:
    """Write a split of a prepared corpus as ``PREFIX.bin`` and ``PREFIX.idx``, one sequence a document.

    Documents keep their end-of-document token, as with ``--append-eod`` of Megatron's preprocessing.

    Raises:
        DataError: a file exists or cannot be written, or the split holds another number of documents than promised.
    """
    with IndexedWriter(prefix, token_dtype(corpus.vocab_size)) as writer:
        num_documents = 0
        for document in _documents(corpus):
            writer.add_document(document)
            num_documents += 1
        if num_documents != corpus.num_documents:
            raise DataError(
                f"{corpus.directory} is damaged: {num_documents} documents were found, but its index promises "
                f"{corpus.num_documents}. Run `mslm data prepare` again into a new directory."
            )


def _documents(corpus: Corpus) -> Iterator[np.ndarray]:
    """[n] ids of each document, the end-of-document token as its last."""
    begun: list[np.ndarray] = []
    for start in range(0, corpus.num_tokens, EXPORT_TOKENS):
        tokens = corpus.tokens(start, min(start + EXPORT_TOKENS, corpus.num_tokens))
        ends = np.flatnonzero(tokens == corpus.eod_id) + 1
        *complete, rest = np.split(tokens, ends)
        for part in complete:
            yield np.concatenate([*begun, part]) if begun else part
            begun = []
        if len(rest):
            begun.append(rest)
    if begun:
        yield np.concatenate(begun)
