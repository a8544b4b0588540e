"""Documents scored by a model, several in a row: what it thinks of every label that counts, under tp and pp.

Shapes: B micro-batch, S slots of a row, n labels of a document that count, L labels of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.data.examples.document import Document, Row, build_rows, row_of
from megatron_slm.data.examples.packing import best_fit_decreasing
from megatron_slm.evaluate.confidence import CONFIDENCE
from megatron_slm.parallel.groups import is_last_pipeline_rank
from megatron_slm.parallel.vocab_scores import CORRECT, LOGPROB

ON_HOST = "document_ids"
_AT_A_TIME = 64
_SHORT_ROW, _ROW_MULTIPLE = 512, 128
"""Slots: documents are packed, and a row divides over tensor- and context-parallel ranks."""


class Scored(NamedTuple):
    """Of the labels of a document that count, float64 [n] each.

    Attributes:
        logprobs: in nats.
        correct: 1 where the label is a likeliest token.
        confidence: probability of the likeliest token.
    """

    logprobs: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray


class Reader(NamedTuple):
    """A model that reads.

    Attributes:
        forward: micro-batches, their ``seq_length`` -> the output of each, [K, B, S] (of ``ConfidentScores`` for
            :meth:`read`), on the ranks that end the model; empty elsewhere. Collective.
        multiple: a forward pass takes a multiple of so many micro-batches (the pipeline size, when interleaved).
        groups: of one model copy.
        seq_length: slots of a row at most, and of a document; rows are shorter where all documents are.
        micro_batch_size: rows of a forward pass.
        eod_id: pads.
    """

    forward: Callable[..., list[Tensor]]
    multiple: int
    groups: Any
    device: torch.device
    seq_length: int
    micro_batch_size: int
    eod_id: int

    def read(self, documents: Sequence[Document]) -> list[Scored]:
        """The scores of each document, on all ranks of the model. Collective."""
        found = self.values(documents, (LOGPROB, CORRECT, CONFIDENCE))
        return [Scored(*one.cpu().numpy()) for one in found]

    def values(self, documents: Sequence[Document], which: Sequence[int]) -> list[Tensor]:
        """What the model's ending gives at the labels of each document that count, on all ranks of it. Collective.

        Args:
            which: indices W into the first dimension of the ending's output.

        Returns:
            float64 [W, n] a document.
        """
        counts = [int(np.count_nonzero(one.weights[1:])) for one in documents]
        # What has nothing that counts is not read: a text of one token has no label at all.
        asked = [at for at, count in enumerate(counts) if count]
        sizes = np.array([documents[at].num_slots for at in asked], np.int64)
        slots = self._slots(int(sizes.max(initial=0)))
        packing = best_fit_decreasing(sizes, slots)
        members = [[asked[at] for at in packing.row(number)] for number in range(packing.num_rows)]
        ends = np.cumsum([0, *counts])
        found = torch.zeros(len(which), int(ends[-1]), dtype=torch.float64, device=self.device)
        for rows, output in self._forward(documents, members, slots):
            order = [at for row in rows for at in row]
            number, slot = places(documents, rows)
            values = output[:, number.to(self.device), slot.to(self.device)].double()
            parts = values[list(which)].split([counts[at] for at in order], dim=1)
            for at, part in zip(order, parts, strict=True):
                found[:, ends[at] : ends[at + 1]] = part
        if self.groups.mp.size() > 1 and found.numel():
            speaker = (self.groups.pp.size() - 1) * self.groups.tp.size()
            dist.broadcast(found, group=self.groups.mp, group_src=speaker)
        return list(found.split(counts, dim=1))

    def _forward(
        self, documents: Sequence[Document], members: list[list[int]], slots: int
    ) -> Iterator[tuple[list[list[int]], Tensor]]:
        """The documents of each micro-batch and its output [K, B, S], where the model ends; runs it everywhere."""
        size = self.micro_batch_size
        parts = [members[first : first + size] for first in range(0, len(members), size)]
        parts += [[] for _ in range(-len(parts) % self.multiple)]
        step = max(1, _AT_A_TIME // self.multiple) * self.multiple
        for first in range(0, len(parts), step):
            some = parts[first : first + step]
            batches = [self._batch(documents, part, slots) for part in some]
            outputs = self.forward(batches, seq_length=slots)
            if is_last_pipeline_rank(self.groups):
                yield from zip(some, outputs, strict=True)

    def _slots(self, longest: int) -> int:
        """Of a row: what the longest document needs, and enough to pack several short ones."""
        return min(self.seq_length, max(_SHORT_ROW, -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE))

    def _batch(self, documents: Sequence[Document], part: list[list[int]], slots: int) -> dict[str, Tensor]:
        rows: list[Row | None] = [row_of([documents[at] for at in row]) for row in part]
        rows += [None] * (self.micro_batch_size - len(rows))
        batch = build_rows(rows, seq_length=slots, eod_id=self.eod_id)
        return {name: field if name == ON_HOST else field.to(self.device) for name, field in batch.items()}


def places(documents: Sequence[Document], rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Row and slot of every label that counts, document after document."""
    numbers, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, row in enumerate(rows):
        start = 0
        for at in row:
            own = np.flatnonzero(documents[at].weights[1:])
            slots.append(start + own)
            numbers.append(np.full(len(own), number))
            start += documents[at].num_slots
    return torch.from_numpy(np.concatenate(numbers)), torch.from_numpy(np.concatenate(slots))
