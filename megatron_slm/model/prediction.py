"""Multi-token prediction: what its depths are asked for, and how their losses join the main one (arXiv 2412.19437).

At depth k position i has read the tokens up to i + k and predicts token i + k + 1; depth 0 is the main model.
Shapes: B micro-batch, S sequence, local to the cp rank but for the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from megatron_slm.parallel.context import cut
from megatron_slm.parallel.vocab_loss import CROSS_ENTROPY, OBJECTIVE


def deeper_targets(
    labels: Tensor, loss_mask: Tensor, documents: Tensor | None, *, depths: int, group: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and loss mask [B, S] of depth 1, 2, ...: those of the position so many tokens later.

    A position counts where the main loss counts that later one, and where both lie in the same document; the last ones
    of a sample have nothing to predict.

    Args:
        documents: int64 [B, S of all cp ranks] on the host, or None where a sample is one document.
        group: cp group.
    """
    for depth in range(1, depths + 1):
        labels, _ = roll_tensor(labels, cp_group=group)
        loss_mask, _ = roll_tensor(loss_mask, cp_group=group)
        if documents is None:
            yield labels, loss_mask
        else:
            yield labels, loss_mask * same_document(documents, depth, group).to(loss_mask.device)


def same_document(documents: Tensor, depth: int, group: Any) -> Tensor:
    """Which positions of this cp rank lie in one document with the position ``depth`` later: bool [B, S]."""
    same = torch.zeros_like(documents, dtype=torch.bool)
    same[:, :-depth] = documents[:, depth:] == documents[:, :-depth]
    return same if group.size() == 1 else cut(same, 1, group.rank(), group.size())


def with_predictions(sums: Tensor, deeper: Sequence[tuple[Tensor, Tensor]], weight: float) -> Tensor:
    """The main loss's sums [3] with those of every depth: [3 + 2 x depths].

    Args:
        sums: of ``vocab_parallel_loss``.
        deeper: the same of each depth, and the number of its loss tokens.
        weight: of each depth in the objective.

    Returns:
        ``sums``, its objective with the weighted ones added; then of each depth the cross-entropy and its tokens.
    """
    objective = sums[OBJECTIVE] + weight * torch.stack([own[OBJECTIVE] for own, _ in deeper]).sum()
    logged = [value.to(sums.dtype) for own, tokens in deeper for value in (own[CROSS_ENTROPY], tokens)]
    return torch.stack([objective, *sums[OBJECTIVE + 1 :], *logged])
