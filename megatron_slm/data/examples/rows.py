"""Sources of rows: compiled examples, packed when they are opened, and a corpus of text as one more source.

A sample of the order of a run is one row. Of preferences both answers of a pair lie in one row, the chosen one first.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.examples.document import Batch, Document, Row, build_rows, row_of
from megatron_slm.data.examples.packing import PACKING_VERSION, Packing, best_fit_decreasing, one_a_row
from megatron_slm.data.examples.store import ASSISTANT, RATIONALE, ExampleStore, holds_examples
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import DataError

TRAINED = ("assistant", "completion", "all")
"""Which labels are trained: what the assistant made, weighted as the examples say; of that the last turn alone; or
every token with weight 1."""

SORTED_BY = ("length", "score")


class RowSource(Protocol):
    """A source of rows of one length."""

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""

    @property
    def digest(self) -> str:
        """Equal only where the rows are."""

    @property
    def eod_id(self) -> int:
        """The end-of-document token, which pads."""

    def row(self, index: int) -> Row:
        """Row ``index``, of at most seq_length slots."""


@dataclass(frozen=True)
class ExampleRows:
    """The rows of a split of chats or preferences.

    Args:
        store: of kind "chat" or "preference".
        seq_length: slots of a row.
        packed: several documents (of preferences: pairs) share a row; else each has its own.
        trained: one of :data:`TRAINED`; with ``pooled`` it says which slots count besides the last token's.
        pooled: for a scalar head at the last token, as reward models have it (see ``document.py``).
        part: (number, parts): of the examples sorted by ``sorted_by`` the part ``number``, counted from 0 at the
            easiest. Each is a source of its own, and the phases of a mixture say when it comes: a curriculum.
        sorted_by: one of :data:`SORTED_BY`; the length is a pair's sum.

    Raises:
        DataError: an example does not fit ``seq_length``, there is none, or a part is asked of what has no scores.
    """

    store: ExampleStore
    seq_length: int
    packed: bool = True
    trained: str = "assistant"
    pooled: bool = False
    part: tuple[int, int] = (0, 1)
    sorted_by: str = "length"

    def __post_init__(self) -> None:
        assert self.trained in TRAINED, f"trained is one of {TRAINED}, not {self.trained}"
        assert self.sorted_by in SORTED_BY, f"sorted_by is one of {SORTED_BY}, not {self.sorted_by}"
        assert 0 <= self.part[0] < self.part[1], f"there is no part {self.part[0]} of {self.part[1]}"
        where = self.store.directory
        if self.store.kind == "prompt":
            raise DataError(
                f"{where} holds prompts, which are not trained on as they are; sft needs chats (--kind chat)."
            )
        if not len(self.units):
            raise DataError(f"{where} holds no example for part {self.part[0]} of {self.part[1]}; compile more rows.")
        longest = int(self._unit_slots.max())
        if longest > self.seq_length:
            raise DataError(
                f"{where} holds {'a pair' if self.per_unit > 1 else 'an example'} of {longest} tokens, which does not "
                f"fit model.seq_length {self.seq_length}; raise that, or compile the examples again with --seq-length "
                f"{self.seq_length}."
            )

    @property
    def per_unit(self) -> int:
        """Documents that stay together: the two of a pair, or one."""
        return 2 if self.store.kind == "preference" else 1

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""
        return self.packing.num_rows

    @property
    def eod_id(self) -> int:
        """The end-of-document token, which pads."""
        return self.store.eod_id

    @functools.cached_property
    def digest(self) -> str:
        """Of the examples and of how they become rows; the sequence length is the order's to tell."""
        how = f"{PACKING_VERSION} {self.packed} {self.trained} {self.pooled} {self.part} {self.sorted_by}"
        return hashlib.sha256(f"rows {self.store.digest} {how}".encode()).hexdigest()

    @functools.cached_property
    def units(self) -> np.ndarray:
        """int64 [units]: the first document of each pair or example that belongs to the part, in their order."""
        first = np.arange(0, self.store.num_documents, self.per_unit)
        number, parts = self.part
        if parts == 1:
            return first
        if self.sorted_by == "length":
            difficulty: np.ndarray = self._slots.reshape(-1, self.per_unit).sum(axis=1)
        else:
            difficulty = self.store.scores[first]
            if np.isnan(difficulty).any():
                raise DataError(
                    f"{self.store.directory} has examples without a score, so they cannot be sorted by it; compile "
                    "them again with --score-key FIELD, or sort by length."
                )
        chosen = np.array_split(np.argsort(difficulty, kind="stable"), parts)[number]
        return first[np.sort(chosen)]

    @functools.cached_property
    def packing(self) -> Packing:
        """Which units share a row."""
        return (best_fit_decreasing if self.packed else one_a_row)(self._unit_slots, self.seq_length)

    @property
    def described(self) -> str:
        """How well the rows are filled, for a log."""
        what = "pairs" if self.per_unit > 1 else "examples"
        return (
            f"{self.num_samples:,} rows of {self.seq_length}, {self.packing.efficiency:.1%} of their slots used, "
            f"{len(self.units) / self.num_samples:.2f} {what} a row"
        )

    def order(self, seed: int) -> SampleOrder:
        """The order in which the rows come, epoch after epoch."""
        return SampleOrder(self.num_samples, seed, self.digest, self.seq_length)

    def row(self, index: int) -> Row:
        """Row ``index``."""
        return row_of([self.document(number) for number in self.documents(index)])

    def documents(self, index: int) -> list[int]:
        """Numbers, in the store, of the documents of row ``index``, in their order."""
        return [int(first) + k for first in self.units[self.packing.row(index)] for k in range(self.per_unit)]

    def document(self, number: int) -> Document:
        """One document of the store, with its weights as ``trained`` wants them."""
        tokens = self.store.tokens(number)
        fields = {}
        if self.store.kind == "preference":
            fields["margins"] = np.full(len(tokens), self.store.margins[number], dtype=np.float32)
        return Document(tokens.astype(np.int64), self._weights(number), fields, self.pooled)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows ``indices`` as the tensors of a micro-batch; see :func:`build_rows`."""
        return build_rows([self.row(index) for index in indices], seq_length=self.seq_length, eod_id=self.eod_id)

    def _weights(self, number: int) -> np.ndarray:
        weights = self.store.weights(number)
        if self.trained == "all":
            return np.ones(len(weights), dtype=np.float32)
        if self.trained == "completion":
            made = np.isin(self.store.roles(number), (ASSISTANT, RATIONALE))
            before = np.flatnonzero(~made)
            weights = np.where(np.arange(len(weights)) > (before[-1] if len(before) else -1), weights, np.float32(0.0))
        return weights

    @functools.cached_property
    def _slots(self) -> np.ndarray:
        return self.store.lengths.astype(np.int64) - (not self.pooled)

    @functools.cached_property
    def _unit_slots(self) -> np.ndarray:
        return sum((self._slots[self.units + k] for k in range(self.per_unit)), np.zeros(len(self.units), np.int64))


@dataclass(frozen=True)
class CorpusRows:
    """A corpus of text as a source of rows: its samples as pretraining reads them, every label with weight 1.

    Args:
        own_documents: tokens attend to their own document only, and positions restart with it.

    Raises:
        DataError: the corpus is too short for one row.
    """

    corpus: Corpus
    seq_length: int
    own_documents: bool = False

    def __post_init__(self) -> None:
        if not self.num_samples:
            raise DataError(
                f"{self.corpus.directory} has {self.corpus.num_tokens} tokens, too few for one row of model.seq_length "
                f"{self.seq_length}; replay a larger corpus, or lower that."
            )

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""
        return self.corpus.num_samples(self.seq_length)

    @property
    def digest(self) -> str:
        """Of the corpus and of how its documents are read."""
        return hashlib.sha256(f"corpus rows {self.corpus.digest} {self.own_documents}".encode()).hexdigest()

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""
        return self.corpus.eod_id

    def order(self, seed: int) -> SampleOrder:
        """The order in which the rows come, epoch after epoch."""
        return SampleOrder(self.num_samples, seed, self.digest, self.seq_length)

    def row(self, index: int) -> Row:
        """Sample ``index``."""
        tokens = self.corpus.sample(index, self.seq_length).astype(np.int64)
        begins = np.zeros(self.seq_length, dtype=bool)
        if self.own_documents:
            begins[1:] = tokens[:-2] == self.eod_id
        places = np.arange(self.seq_length)
        documents = np.cumsum(begins)
        return Row(
            tokens=tokens[:-1],
            labels=tokens[1:],
            weights=np.ones(self.seq_length, dtype=np.float32),
            documents=documents,
            positions=places - np.maximum.accumulate(np.where(begins, places, 0)),
            fields={},
            num_documents=int(documents[-1]) + 1,
        )


def open_rows(
    directory: str | Path,
    seq_length: int,
    *,
    packed: bool = True,
    trained: str = "assistant",
    pooled: bool = False,
    verify: str = "size",
) -> ExampleRows | CorpusRows:
    """The rows of a split of compiled examples, or of a corpus that `mslm data prepare` wrote.

    Args:
        packed, trained, pooled: of :class:`ExampleRows`.
        verify: of :meth:`ExampleStore.open` and :meth:`Corpus.open`.

    Raises:
        DataError: the split is missing or damaged, or gives no row of this length.
    """
    if holds_examples(directory):
        store = ExampleStore.open(directory, verify)
        return ExampleRows(store, seq_length, packed=packed, trained=trained, pooled=pooled)
    return CorpusRows(Corpus.open(directory, verify), seq_length)
