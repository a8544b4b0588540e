"""Samples of a corpus as the tensors of one micro-batch. B samples of S tokens; all tensors are global in S, on CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_slm.data.mixture import MixtureOrder

Batch = dict[str, torch.Tensor]


class Samples(Protocol):
    """A source of samples: a corpus, or what another run has read of some."""

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""

    def sample(self, index: int, seq_length: int) -> np.ndarray:
        """Tokens [seq_length + 1] of a sample: the inputs, and the last label."""


def build_batch(
    corpora: Mapping[str, Samples],
    order: MixtureOrder,
    positions: Sequence[int],
    *,
    eod_id: int,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
    windows: Sequence[int] | None = None,
) -> Batch:
    """The samples at ``positions`` of ``order``, out of ``corpora`` by source; see :func:`build_samples`."""
    rows: list[np.ndarray | None] = []
    for position in positions:
        found = order.sample_id(position)
        rows.append(corpora[found.source].sample(found.index, order.seq_length))
    return build_samples(
        rows,
        seq_length=order.seq_length,
        eod_id=eod_id,
        reset_attention_mask=reset_attention_mask,
        reset_position_ids=reset_position_ids,
        eod_mask_loss=eod_mask_loss,
        windows=windows,
    )


def build_samples(
    rows: Sequence[np.ndarray | None],
    *,
    seq_length: int,
    eod_id: int,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
    windows: Sequence[int] | None = None,
) -> Batch:
    """A batch of samples; ``None`` is a slot without a sample, whose whole loss is masked.

    Args:
        rows: tokens [S + 1] of each sample.
        reset_attention_mask: add ``document_ids``; tokens attend within equal ids only.
        reset_position_ids: positions restart at 0 after every end-of-document token.
        eod_mask_loss: no loss where the *input* is the end-of-document token, as in Megatron: what follows it is
            the beginning of an unrelated document.
        windows: tokens of a window, for each row a divisor of S. Every window begins as a document does, for
            ``document_ids`` and ``position_ids``.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 [B, S], ``loss_mask`` float32 [B, S], and with
        ``reset_attention_mask`` ``document_ids`` int64 [B, S]: documents of the sample counted from 0, the
        end-of-document token belonging to the document it ends. Nothing is shared with the memory-mapped files.
    """
    tokens = np.empty((len(rows), seq_length), dtype=np.int64)
    labels = np.empty_like(tokens)
    for row, sample in enumerate(rows):
        # The slot without a sample holds end-of-document tokens: valid ids, and each its own document.
        tokens[row] = eod_id if sample is None else sample[:-1]
        labels[row] = eod_id if sample is None else sample[1:]
    fields = fields_beside(
        tokens,
        eod_id=eod_id,
        reset_attention_mask=reset_attention_mask,
        reset_position_ids=reset_position_ids,
        eod_mask_loss=eod_mask_loss,
        windows=windows,
    )
    fields["loss_mask"][[row for row, found in enumerate(rows) if found is None]] = 0.0
    arrays = {"tokens": tokens, "labels": labels, **fields}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def fields_beside(
    tokens: np.ndarray,
    *,
    eod_id: int,
    reset_attention_mask: bool,
    reset_position_ids: bool,
    eod_mask_loss: bool,
    windows: Sequence[int] | None,
) -> dict[str, np.ndarray]:
    """``loss_mask``, ``position_ids`` and perhaps ``document_ids`` of ``tokens`` [B, S]; see :func:`build_samples`."""
    loss_mask = np.ones(tokens.shape, dtype=np.float32)
    if eod_mask_loss:
        loss_mask[tokens == eod_id] = 0.0
    arrays: dict[str, np.ndarray] = {"loss_mask": loss_mask}
    position_ids = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int64), tokens.shape)
    if reset_position_ids or reset_attention_mask:
        # True where a document begins: after every end-of-document token, so that the token itself ends its document.
        begins = np.zeros(tokens.shape, dtype=bool)
        begins[:, 1:] = tokens[:, :-1] == eod_id
        for row, window in enumerate(windows or ()):
            begins[row, window::window] = True
        if reset_attention_mask:
            arrays["document_ids"] = np.cumsum(begins, axis=1, dtype=np.int64)
        if reset_position_ids:
            position_ids = position_ids - np.maximum.accumulate(np.where(begins, position_ids, 0), axis=1)
    arrays["position_ids"] = position_ids.copy()
    return arrays
