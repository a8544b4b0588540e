"""Context parallelism: which tokens of a sequence each cp rank holds.

A sequence of S tokens is 2 x cp chunks of equal length, and cp rank r holds chunk r and chunk 2 x cp - 1 - r, in that
order ("zigzag"): causal attention then gives every rank the same number of pairs to compute. Core's rotary embedding
and the shapes of its pipeline assume this cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WHOLE = ("document_ids",)
"""What every cp rank keeps of a batch as it is: parallel/attention.py reads the documents of all keys on the host."""


def cut_batch(batch: dict[str, Tensor], cp_rank: int, cp_size: int) -> dict[str, Tensor]:
    """This cp rank's part of a batch: tensors [B, S] -> [B, S/cp], but for those of ``WHOLE``."""
    if cp_size == 1:
        return batch
    return {
        name: tensor if name in WHOLE else cut(tensor, 1, cp_rank, cp_size).contiguous()
        for name, tensor in batch.items()
    }


def cut(tensor: Tensor, dim: int, cp_rank: int, cp_size: int) -> Tensor:
    """The two chunks of one cp rank: ``dim`` of length S becomes S/cp."""
    length = tensor.shape[dim]
    assert length % (2 * cp_size) == 0, f"{length} tokens are no {2 * cp_size} equal chunks: seq_length is wrong"
    chunks = tensor.chunk(2 * cp_size, dim)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]], dim)


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The inverse of ``cut``: the parts of all cp ranks, in their order -> the whole sequence."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def positions(length: int, cp_rank: int, cp_size: int) -> Tensor:
    """Positions in the whole sequence of one cp rank's tokens: int64 [length / cp_size], on the host."""
    return cut(torch.arange(length), 0, cp_rank, cp_size)


def tokens_before(position: int, length: int, cp_rank: int, cp_size: int) -> int:
    """How many of one cp rank's tokens lie before ``position`` of a sequence of ``length``."""
    chunk = length // (2 * cp_size)
    return sum(min(max(position - number * chunk, 0), chunk) for number in (cp_rank, 2 * cp_size - 1 - cp_rank))


def rotary_part(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
    """Core's ``get_pos_emb_on_this_cp_rank``, without its pinned memory."""
    return cut(pos_emb, seq_dim, cp_group.rank(), cp_group.size())
