"""Documents with per-token weights, laid into rows of one length, and rows as the tensors of a micro-batch.

A document of n tokens takes n - 1 slots: its tokens but the last as inputs, its tokens but the first as labels. So a
label is always of the same document as its input, and no slot is spent on a token that predicts nothing. A document
that is *pooled* takes n slots: a scalar head is read at its last token, which therefore is an input too.

B rows of S slots; all tensors are global in S, on CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Batch = dict[str, torch.Tensor]

UNTRAINED = -1
"""Segment of a slot whose label has no weight."""


@dataclass(frozen=True)
class Document:
    """One sequence that attends to itself alone.

    Attributes:
        tokens: [n] ids.
        weights: float32 [n], of each token as a label; that of the first is never used.
        fields: float32 [n] by name, more numbers about each token as a label (``old_logprobs``, ``margins`` ...),
            aligned as ``weights`` are.
        pooled: a scalar head is read at the last token, so it is an input too; its slot has the weight 1 and the label
            ``tokens[-1]``, which no loss over labels may use.
    """

    tokens: np.ndarray
    weights: np.ndarray
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    pooled: bool = False

    @property
    def num_slots(self) -> int:
        """Slots of a row that it takes."""
        return len(self.tokens) - (not self.pooled)


@dataclass(frozen=True)
class Row:
    """Documents one after another, at most S slots; what is left is padded when a batch is built.

    Attributes:
        tokens, labels: int64 [slots].
        weights: float32 [slots], of the labels; 0 is not trained.
        documents: int64 [slots], number of the document in the row.
        positions: int64 [slots], from 0 in every document.
        fields: float32 [slots] by name.
        num_documents: in the row; each is a segment.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    fields: Mapping[str, np.ndarray]
    num_documents: int


def row_of(documents: Sequence[Document]) -> Row:
    """The documents in one row, in this order."""
    lengths = [document.num_slots for document in documents]
    names = sorted({name for document in documents for name in document.fields})
    return Row(
        tokens=_joined([document.tokens[:length] for document, length in zip(documents, lengths, strict=True)]),
        labels=_joined([_of_labels(document, document.tokens) for document in documents]),
        weights=_joined([_weights(document) for document in documents], np.float32),
        documents=np.repeat(np.arange(len(documents), dtype=np.int64), lengths),
        positions=_joined([np.arange(length) for length in lengths]),
        fields={
            name: _joined(
                [
                    _of_labels(document, document.fields.get(name, np.zeros(len(document.tokens), np.float32)))
                    for document in documents
                ],
                np.float32,
            )
            for name in names
        },
        num_documents=len(documents),
    )


def build_rows(rows: Sequence[Row | None], *, seq_length: int, eod_id: int) -> Batch:
    """A micro-batch of rows; ``None`` is a slot of the batch without a row, whose whole loss is masked.

    Returns:
        ``tokens``, ``labels``, ``position_ids``, ``document_ids``, ``segments`` int64 [B, S], ``loss_mask`` float32
        [B, S] and each field of the rows, float32 [B, S]. ``document_ids`` are counted within the row; the padding at
        its end is a document of its own. ``segments`` number the documents of the micro-batch in the order of its rows,
        and are -1 where ``loss_mask`` is 0.
    """
    shape = (len(rows), seq_length)
    padding = {"tokens": eod_id, "labels": eod_id, "segments": UNTRAINED}
    batch = {name: np.full(shape, padding.get(name, 0), dtype=np.int64) for name in (*padding, "document_ids")}
    batch["position_ids"] = np.tile(np.arange(seq_length, dtype=np.int64), (len(rows), 1))
    batch["loss_mask"] = np.zeros(shape, dtype=np.float32)
    batch |= {name: np.zeros(shape, dtype=np.float32) for row in rows if row is not None for name in row.fields}
    first = 0
    for place, row in enumerate(rows):
        if row is None:
            continue
        end = len(row.tokens)
        assert end <= seq_length, f"a row of {end} slots does not fit seq_length {seq_length}"
        batch["tokens"][place, :end], batch["labels"][place, :end] = row.tokens, row.labels
        batch["loss_mask"][place, :end] = row.weights
        batch["document_ids"][place, :end], batch["document_ids"][place, end:] = row.documents, row.num_documents
        batch["position_ids"][place, :end] = row.positions
        batch["position_ids"][place, end:] -= end
        batch["segments"][place, :end] = np.where(row.weights != 0.0, row.documents + first, UNTRAINED)
        for name, values in row.fields.items():
            batch[name][place, :end] = values
        first += row.num_documents
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _of_labels(document: Document, values: np.ndarray) -> np.ndarray:
    """What belongs to the label of each slot; at the last token of a pooled document there is none, and it repeats."""
    return np.concatenate([values[1:], values[-1:]]) if document.pooled else values[1:]


def _weights(document: Document) -> np.ndarray:
    weights = _of_labels(document, document.weights).astype(np.float32)
    if document.pooled:
        weights[-1] = 1.0
    return weights


def _joined(parts: Sequence[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
