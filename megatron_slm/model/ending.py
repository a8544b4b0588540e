"""What the chunk that ends the model makes of its hidden states: sums of the loss, scores of every token, a number.

The stage chooses. Shapes: S sequence of this cp rank, B batch, H hidden, T = S x B tokens in core's order (sequence
first), V_l rows of the output matrix on this tp rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_slm.parallel.vocab_loss import Objective, vocab_parallel_loss
from megatron_slm.parallel.vocab_scores import Vocabulary, vocab_parallel_scores

Fields = Mapping[str, Tensor]
"""The batch of the forward pass: tensors [B, S] or [B, S, K], ``labels`` and ``loss_mask`` among them."""


class Ending(Protocol):
    """An ending that multiplies with the output matrix."""

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """hidden [T, H], equal on all ranks of the tp ``group``, and weight [V_l, H] -> what the loss is given."""


@dataclass(frozen=True)
class TokenSums:
    """The masked sums [3] of ``vocab_parallel_loss``: nothing of a single token is left. Pretraining ends so."""

    objective: Objective

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [3]; see ``vocab_parallel_loss``."""
        labels, loss_mask = sequence_first(fields["labels"]), sequence_first(fields["loss_mask"])
        return vocab_parallel_loss(hidden, weight, labels, loss_mask, group=group, objective=self.objective)


@dataclass(frozen=True)
class TokenScores:
    """Log-probability, entropy and correctness of every label that counts; see ``vocab_parallel_scores``.

    ``loss_mask`` says which labels count, ``kept`` [B, S, N], where the batch has it, among which ids they were drawn.
    """

    vocabulary: Vocabulary

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [3, B, S]: ``LOGPROB``, ``ENTROPY``, ``CORRECT``."""
        labels = fields["labels"]
        kept = fields.get("kept")
        scores = vocab_parallel_scores(
            hidden,
            weight,
            sequence_first(labels),
            sequence_first(fields["loss_mask"]),
            group=group,
            vocabulary=self.vocabulary,
            kept=None if kept is None else sequence_first(kept),
        )
        return batch_first(scores, *labels.shape)


@dataclass(frozen=True)
class Scalar:
    """One number a token in the place of the vocabulary: a reward model, a critic. There is no output matrix.

    Args:
        initial_deviation: of the head's weights; 0 starts with the number 0 everywhere.
    """

    initial_deviation: float = 0.0


class ScalarHead(nn.Module):
    """hidden -> one number, on all tp ranks alike.

    Args:
        hidden_size: H.
        sequence_parallel: hidden states come as [S/tp, B, H], and are gathered.
        group: tp group.
    """

    def __init__(self, hidden_size: int, *, sequence_parallel: bool, group: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self._sequence_parallel = sequence_parallel
        self._group = group

    def forward(self, hidden: Tensor) -> Tensor:
        """[S(/tp), B, H] -> [B, S] in fp32 (float64 for float64 input)."""
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        numbers = torch.nn.functional.linear(hidden.to(exact), self.weight.to(exact))
        if self._sequence_parallel:
            # Every rank goes on with the whole: its gradient is the whole one, of which each takes its own tokens.
            numbers = gather_from_sequence_parallel_region(
                numbers, tensor_parallel_output_grad=False, group=self._group
            )
        return numbers[..., 0].t()


def sequence_first(field: Tensor) -> Tensor:
    """[B, S] -> [T]; [B, S, K] -> [T, K]."""
    return field.transpose(0, 1).reshape(-1, *field.shape[2:])


def batch_first(values: Tensor, batch: int, sequence: int) -> Tensor:
    """[K, T] -> [K, B, S]."""
    return values.view(-1, sequence, batch).transpose(1, 2).contiguous()
