"""Samples of a corpus as the tensors of one micro-batch. B samples of S tokens; all tensors are global in S, on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.order import SampleOrder

Batch = dict[str, torch.Tensor]


def build_batch(
    corpus: Corpus,
    order: SampleOrder,
    positions: Sequence[int],
    *,
    seq_length: int,
    eod_id: int,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
) -> Batch:
    """The samples at ``positions`` of ``order``; see :func:`build_samples` for the tensors."""
    assert order.seq_length == seq_length, f"the order is for {order.seq_length} tokens, not {seq_length}"
    return build_samples(
        corpus,
        [order.sample_id(position).index for position in positions],
        seq_length=seq_length,
        eod_id=eod_id,
        reset_attention_mask=reset_attention_mask,
        reset_position_ids=reset_position_ids,
        eod_mask_loss=eod_mask_loss,
    )


def build_samples(
    corpus: Corpus,
    indices: Sequence[int | None],
    *,
    seq_length: int,
    eod_id: int,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
) -> Batch:
    """Samples by their index in the corpus; ``None`` is a slot without a sample, whose whole loss is masked.

    Args:
        reset_attention_mask: add ``document_ids``; tokens attend within equal ids only.
        reset_position_ids: positions restart at 0 after every end-of-document token.
        eod_mask_loss: no loss where the *input* is the end-of-document token, as in Megatron: what follows it is
            the beginning of an unrelated document.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 [B, S], ``loss_mask`` float32 [B, S], and with
        ``reset_attention_mask`` ``document_ids`` int64 [B, S]: documents of the sample counted from 0, the
        end-of-document token belonging to the document it ends. Nothing is shared with the memory-mapped files.
    """
    # The slot without a sample holds end-of-document tokens: valid ids, and each its own document.
    stream = np.full((len(indices), seq_length + 1), eod_id, dtype=np.int64)
    for row, index in enumerate(indices):
        if index is not None:
            start = index * seq_length
            stream[row] = corpus.tokens(start, start + seq_length + 1)
    tokens, labels = np.ascontiguousarray(stream[:, :-1]), np.ascontiguousarray(stream[:, 1:])
    loss_mask = np.ones(tokens.shape, dtype=np.float32)
    if eod_mask_loss:
        loss_mask[tokens == eod_id] = 0.0
    loss_mask[[row for row, index in enumerate(indices) if index is None]] = 0.0
    position_ids = np.broadcast_to(np.arange(seq_length, dtype=np.int64), tokens.shape)
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
    if reset_position_ids or reset_attention_mask:
        # True where a document begins: after every end-of-document token, so that the token itself ends its document.
        begins = np.zeros(tokens.shape, dtype=bool)
        begins[:, 1:] = tokens[:, :-1] == eod_id
        if reset_attention_mask:
            arrays["document_ids"] = np.cumsum(begins, axis=1, dtype=np.int64)
        if reset_position_ids:
            position_ids = position_ids - np.maximum.accumulate(np.where(begins, position_ids, 0), axis=1)
    arrays["position_ids"] = position_ids.copy()
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
