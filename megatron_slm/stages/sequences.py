"""Prompts and their completions as micro-batches, and numbers of whole sequences to and from their labels.

Shapes: B micro-batch, S slots of a row, N sequences of a micro-batch, T labels of the longest of them, K kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_slm.data.examples.document import Batch, Document, Row, build_rows, row_of
from megatron_slm.data.examples.packing import best_fit_decreasing
from megatron_slm.rollout.generate import Completion


class Drawn(NamedTuple):
    """A prompt and what was drawn after it; ``sample`` is its number in the whole run."""

    sample: int
    prompt: tuple[int, ...]
    completion: Completion

    def document(self, *, counts: bool = True, pooled: bool = False) -> Document:
        """The drawn labels count, unless the sequence does not; beside them lies with what log-probability."""
        before, drawn = len(self.prompt), len(self.completion.tokens)
        weights, logprobs = (np.zeros(before + drawn, dtype=np.float32) for _ in range(2))
        weights[before:] = float(counts)
        logprobs[before:] = self.completion.logprobs
        tokens = np.array([*self.prompt, *self.completion.tokens], dtype=np.int64)
        return Document(tokens, weights, {} if pooled else {"generation_logprobs": logprobs}, pooled)


class Shape(NamedTuple):
    """Of the micro-batches: slots of a row, rows, and the token that pads."""

    seq_length: int
    micro_batch_size: int
    eod_id: int


class Laid(NamedTuple):
    """Sequences in micro-batches: of each its batch, whole and on the host, and which sequences its segments are."""

    batches: list[Batch]
    owners: list[list[int]]


def lay_out(
    drawn: Sequence[Drawn], shape: Shape, *, counts: Sequence[bool], pooled: bool = False, packed: bool = True
) -> Laid:
    """Sequences in rows of ``seq_length`` slots, several in a row, and rows in micro-batches.

    Args:
        counts: whether each sequence is trained on.
        pooled: for a scalar head at the last token, which is then an input too.
        packed: else every sequence has a row.
    """
    documents = [each.document(counts=one, pooled=pooled) for each, one in zip(drawn, counts, strict=True)]
    laid = lay_out_documents(documents, shape, packed=packed)
    for batch, own in zip(laid.batches, laid.owners, strict=True):
        if any(drawn[at].completion.kept is not None for at in own):
            batch["kept"] = _kept(batch, [drawn[at] for at in own])
    return laid


def lay_out_documents(documents: Sequence[Document], shape: Shape, *, packed: bool = True) -> Laid:
    """The same of documents that are there already."""
    slots = np.array([each.num_slots for each in documents], dtype=np.int64)
    if packed:
        packing = best_fit_decreasing(slots, shape.seq_length)
        members = [packing.row(number).tolist() for number in range(packing.num_rows)]
    else:
        members = [[number] for number in range(len(documents))]
    batches, owners = [], []
    size = shape.micro_batch_size
    for first in range(0, len(members), size):
        own = members[first : first + size]
        rows: list[Row | None] = [row_of([documents[at] for at in row]) for row in own]
        rows += [None] * (size - len(rows))
        batches.append(build_rows(rows, seq_length=shape.seq_length, eod_id=shape.eod_id))
        owners.append([at for row in own for at in row])
    return Laid(batches, owners)


def filled_up(laid: Laid, number: int, shape: Shape) -> Laid:
    """The same with micro-batches in which nothing counts, until there are ``number``: every rank takes as many."""
    empty = build_rows([None] * shape.micro_batch_size, seq_length=shape.seq_length, eod_id=shape.eod_id)
    for name in laid.batches[0] if laid.batches else ("generation_logprobs",):
        if name not in empty and name != "kept":
            empty[name] = torch.zeros_like(empty["loss_mask"])
    missing = number - len(laid.batches)
    more = [{name: field.clone() for name, field in empty.items()} for _ in range(missing)]
    return Laid([*laid.batches, *more], [*laid.owners, *([] for _ in range(missing))])


def labels_of(batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Where the labels of each of ``count`` segments lie: indices int64 [N, T] into [B x S], and which are real."""
    segments = batch["segments"].flatten()
    places = torch.nonzero(segments >= 0)[:, 0]
    owner = segments[places]
    order = torch.argsort(owner, stable=True)
    lengths = torch.bincount(owner, minlength=count)
    longest = int(lengths.max()) if len(lengths) and len(places) else 0
    column = torch.arange(len(places), device=segments.device) - (lengths.cumsum(0) - lengths)[owner[order]]
    index = torch.zeros(count, longest, dtype=torch.int64, device=segments.device)
    index[owner[order], column] = places[order]
    return index, torch.arange(longest, device=segments.device)[None, :] < lengths[:, None]


def gather(field: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """[B, S] -> [N, T]: the values at each sequence's labels, 0 outside of the mask."""
    return torch.where(mask, field.flatten()[index], 0.0)


def scatter(values: Tensor, index: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """[N, T] -> [B, S]: the inverse of ``gather``; 0 at every other slot."""
    field = values.new_zeros(like.numel())
    field[index[mask]] = values[mask]
    return field.view(like.shape)


def _kept(batch: Batch, drawn: Sequence[Drawn]) -> Tensor:
    """int64 [B, S, K]: at every drawn label the ids it was drawn among, filled up with -1."""
    index, mask = labels_of(batch, len(drawn))
    most = max((len(ids) for each in drawn for ids in each.completion.kept or ()), default=1)
    kept = torch.full((batch["segments"].numel(), most), -1, dtype=torch.int64)
    for row, each in enumerate(drawn):
        # A sequence that does not count has no labels here.
        for place, ids in zip(index[row][mask[row]].tolist(), each.completion.kept or (), strict=False):
            kept[place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return kept.view(*batch["segments"].shape, most)
