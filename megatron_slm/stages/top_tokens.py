"""The ending of a teacher that is stored: its most probable tokens at every label that counts.

Shapes: T tokens, H hidden, V_l rows of the output matrix on this tp rank, K tokens, B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.model.ending import Fields, batch_first, sequence_first
from megatron_slm.parallel.vocab_scores import Shard, Vocabulary, chunks


class Top(NamedTuple):
    """The K most probable tokens of each position, the likeliest first.

    Attributes:
        ids: int64 [..., K].
        logprobs: [..., K], in nats, in the whole vocabulary.
        rest: [...], logarithm of what all other tokens have.
    """

    ids: Tensor
    logprobs: Tensor
    rest: Tensor


@dataclass(frozen=True)
class TopTokens:
    """:class:`Top` of every position that counts, in one tensor for core's schedule to carry."""

    vocabulary: Vocabulary
    top_k: int

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [2 K + 1, B, S]: log-probabilities, ids (exact in fp32 up to 2^24), rest; 0 where no label counts."""
        labels = fields["labels"]
        counted = sequence_first(fields["loss_mask"]) != 0
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        found = torch.zeros(2 * self.top_k + 1, len(counted), dtype=exact, device=hidden.device)
        if bool(counted.any()):
            top = vocab_parallel_top(hidden[counted], weight, self.top_k, group=group, vocabulary=self.vocabulary)
            found[:, counted] = torch.cat([top.logprobs.t(), top.ids.t().to(exact), top.rest[None]])
        return batch_first(found, *labels.shape)


def top_of(values: Tensor) -> Top:
    """The columns [2 K + 1, T] of what ``TopTokens`` gives."""
    logprobs, ids = values[:-1].t().chunk(2, dim=1)
    return Top(ids.long(), logprobs, values[-1])


def vocab_parallel_top(hidden: Tensor, weight: Tensor, top_k: int, *, group: Any, vocabulary: Vocabulary) -> Top:
    """The ``top_k`` most probable tokens of each position [T], equal on all tp ranks; no gradient.

    Args:
        hidden: [T, H], equal on all tp ranks.
        weight: [V_l, H], this rank's rows of the output matrix.
        top_k: at most the vocabulary's size.
        group: tp group.
        vocabulary: its size and temperature.
    """
    shard = Shard.of(weight, group, vocabulary)
    found = [_top(shard, shard.logits(hidden[part], weight), top_k, group) for part in chunks(len(hidden))]
    return Top(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _top(shard: Shard, logits: Tensor, top_k: int, group: Any) -> Top:
    """Of logits [T, V_l]. Each shard sends its own best; what is not chosen is added up, so that nothing cancels."""
    width = logits.shape[1]
    values, columns = logits.topk(min(top_k, width), dim=1)
    candidates, ids = _gathered(values, group), _gathered(columns + shard.first, group)
    best, places = candidates.topk(top_k, dim=1)
    ids = ids.gather(1, places)
    columns, mine = shard.columns(ids)
    # One column more, which takes the ids of other ranks.
    chosen = torch.zeros(len(logits), width + 1, dtype=torch.bool, device=logits.device)
    chosen.scatter_(1, torch.where(mine, columns, width), value=True)
    largest = best[:, :1]
    others = (logits.masked_fill(chosen[:, :-1], float("-inf")) - largest).exp().sum(dim=1)
    if group.size() > 1:
        dist.all_reduce(others, group=group)
    log_sum = (others + (best - largest).exp().sum(dim=1)).log()
    return Top(ids, best - largest - log_sum[:, None], others.log() - log_sum)


def _gathered(part: Tensor, group: Any) -> Tensor:
    """[T, N] of every tp rank side by side."""
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)
