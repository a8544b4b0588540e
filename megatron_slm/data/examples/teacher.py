"""What a teacher says of compiled examples, memory-mapped: its most probable tokens at every label that counts.

What is read::

    DIR/manifest.json               what was asked for: the teacher, the examples, K, the temperature
    DIR/SPLIT/index.json            K, temperature, digest of the examples, counts, and the sha256 of every file
    DIR/SPLIT/documents.arrow       one row a document of the examples, columns of :data:`DOCUMENT_COLUMNS`
    DIR/SPLIT/shard-00000.arrow ... one row a label, document after document, columns of :data:`LABEL_COLUMNS`

The labels of a document are its tokens but the first whose weight is not 0, in their order. ``ids`` are the K tokens
that the teacher finds likeliest there, the likeliest first; ``logprobs`` are their log-probabilities in nats in the
whole vocabulary, logits divided by the temperature; ``rest`` is the logarithm of what all other tokens have, so that
the exponentials of ``logprobs`` and ``rest`` add up to 1 (minus infinity where K is the whole vocabulary).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.examples.store import ExampleStore, map_batch
from megatron_slm.data.shards import INDEX_NAME
from megatron_slm.errors import DataError

TEACHER_VERSION = 1
"""Raised when what is stored would be read otherwise."""

DOCUMENTS_NAME = "documents.arrow"
DOCUMENT_COLUMNS = ("shard", "start", "labels")
LABEL_COLUMNS = ("ids", "logprobs", "rest")
REMEDY = "Run `mslm data teacher` again into a new directory."


@dataclass(frozen=True, kw_only=True)
class TeacherRequest:
    """Everything that decides what is written.

    Attributes:
        teacher: sha256 of the manifest of the teacher's checkpoint, which has that of each of its files.
        examples: digest of each split.
        top_k: K.
        temperature: divides the logits.
    """

    teacher: str
    examples: Mapping[str, str]
    top_k: int
    temperature: float
    version: int = TEACHER_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        stored: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return stored

    def differences(self, found: Mapping[str, Any]) -> str:
        """Where the stored request ``found`` asked for something else; empty when it is equal."""
        wanted = self.to_dict()
        changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        return "; ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} was asked for" for name in changed)


class TeacherStore:
    """What a teacher says of one split. Made by :meth:`open`; safe to share between threads and to inherit by fork.

    Attributes:
        top_k: K.
        temperature: that the logits were divided by.
    """

    def __init__(self, directory: Path, index: dict[str, Any], documents: Any, shards: list[Any]) -> None:
        self.directory = directory
        self.top_k: int = index["top_k"]
        self.temperature: float = index["temperature"]
        self.examples_digest: str = index["examples_digest"]
        self.tokenizer_hash: str = index["tokenizer_hash"]
        self._shard, self._start, self._labels = (documents.column(name).to_numpy() for name in DOCUMENT_COLUMNS)
        self._ids = [self._table(shard, "ids") for shard in shards]
        self._logprobs = [self._table(shard, "logprobs") for shard in shards]
        self._rest = [shard.column("rest").to_numpy() for shard in shards]

    @staticmethod
    def open(directory: str | Path, verify: str = "size") -> TeacherStore:
        """Map ``DIR/train`` or ``DIR/valid``.

        Args:
            verify: "size" compares the length of every file with the index; "hash" also its sha256.

        Raises:
            DataError: something is missing or damaged; the message names the file.
        """
        root = Path(directory)
        index = _read_index(root / INDEX_NAME)
        try:
            documents = map_batch(root / DOCUMENTS_NAME, index["documents"], DOCUMENT_COLUMNS, verify, REMEDY)
            shards = [map_batch(root / one["file"], one, LABEL_COLUMNS, verify, REMEDY) for one in index["shards"]]
            store = TeacherStore(root, index, documents, shards)
            promised = (index["num_documents"], index["num_labels"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{root / INDEX_NAME} is damaged: {error!r}. {REMEDY}") from error
        held = (len(store._labels), sum(map(len, store._ids)))
        if promised != held or int(store._labels.sum()) != held[1]:
            raise DataError(
                f"{root / INDEX_NAME} promises {promised[0]} documents with {promised[1]} labels, but its files hold "
                f"{held[0]} with {held[1]}. {REMEDY}"
            )
        return store

    def require_examples(self, examples: ExampleStore) -> None:
        """Refuse other examples than those that the teacher has read.

        Raises:
            DataError: they are others, or of another tokenizer, or some are missing; names both.
        """
        if self.tokenizer_hash != examples.tokenizer_hash:
            raise DataError(
                f"{self.directory} is what a teacher with the tokenizer {self.tokenizer_hash} says, but "
                f"{examples.directory} was made with {examples.tokenizer_hash}: the same ids mean other text. Compile "
                "the examples with the teacher's tokenizer."
            )
        if self.examples_digest != examples.digest:
            raise DataError(
                f"{self.directory} is what a teacher says of the examples {self.examples_digest[:12]}, but "
                f"{examples.directory} holds {examples.digest[:12]}. Run `mslm data teacher` on the latter."
            )
        held = (len(self._labels), int(self._labels.sum()))
        there = (examples.num_documents, sum(examples.index["trained_by_role"].values()))
        if held != there:
            raise DataError(
                f"{self.directory} holds {held[0]} documents with {held[1]} labels, but {examples.directory} "
                f"{there[0]} with {there[1]}. {REMEDY}"
            )

    def ids(self, document: int) -> np.ndarray:
        """[labels, K] token ids, the likeliest first; read-only, a view of the file."""
        return self._of(self._ids, document)

    def logprobs(self, document: int) -> np.ndarray:
        """float32 [labels, K]: their log-probabilities in nats."""
        return self._of(self._logprobs, document)

    def rest(self, document: int) -> np.ndarray:
        """float32 [labels]: the logarithm of what all other tokens have."""
        return self._of(self._rest, document)

    def _of(self, columns: list[np.ndarray], document: int) -> np.ndarray:
        start = self._start[document]
        return columns[self._shard[document]][start : start + self._labels[document]]

    def _table(self, shard: Any, name: str) -> np.ndarray:
        table: np.ndarray = shard.column(name).flatten().to_numpy(zero_copy_only=True)
        return table.reshape(-1, self.top_k)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Give the directory that `mslm data teacher` wrote, with a "
            "split for each that is read."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). {REMEDY}") from error
    version = index.get("teacher_version") if isinstance(index, dict) else None
    if version != TEACHER_VERSION:
        raise DataError(
            f"{path} has teacher_version {version}, but this program reads {TEACHER_VERSION}: it is not what `mslm "
            f"data teacher` wrote, or an older one did. {REMEDY}"
        )
    checked: dict[str, Any] = index
    return checked
