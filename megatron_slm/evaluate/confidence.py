"""An ending for evaluation: the scores of every label, and how sure the model is of its own first choice.

Shapes: T tokens, H hidden, V_l rows of the output matrix on this tp rank, B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.model.ending import Fields, TokenScores, batch_first, sequence_first
from megatron_slm.parallel.vocab_scores import Shard, Vocabulary, chunks

CONFIDENCE = 3
"""Where :class:`ConfidentScores` puts the probability of the likeliest token, behind those of ``TokenScores``."""


@dataclass(frozen=True)
class ConfidentScores:
    """``TokenScores``, and the probability of the likeliest token of each position that counts."""

    vocabulary: Vocabulary

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [4, B, S]: ``LOGPROB``, ``ENTROPY``, ``CORRECT``, ``CONFIDENCE``; 0 where a label does not count."""
        labels = fields["labels"]
        found = TokenScores(self.vocabulary)(hidden, weight, fields, group)
        counted = sequence_first(fields["loss_mask"]) != 0
        confidence = torch.zeros(len(counted), dtype=found.dtype, device=found.device)
        if bool(counted.any()):
            confidence[counted] = confidences(hidden[counted], weight, group, self.vocabulary)
        return torch.cat([found, batch_first(confidence[None], *labels.shape)])


def confidences(hidden: Tensor, weight: Tensor, group: Any, vocabulary: Vocabulary) -> Tensor:
    """Probability of the likeliest token: 1 / sum of exp(l - max l), [T]. Two collectives a chunk."""
    shard, found = Shard.of(weight, group, vocabulary), []
    for part in chunks(len(hidden)):
        logits = shard.logits(hidden[part], weight)
        largest = logits.max(dim=-1).values
        if group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = (logits - largest[:, None]).exp().sum(dim=-1)
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        found.append(1.0 / total)
    return torch.cat(found)
