"""What the chunk that ends the model makes of its hidden states: sums of the loss, scores of every token, a number.

The stage chooses. Shapes: S sequence of this cp rank, B batch, H hidden, T = S x B tokens in core's order (sequence
first), V_l rows of the output matrix on this tp rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_slm.parallel.vocab_divergence import Teacher, vocab_parallel_divergence
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

    ``loss_mask`` says which labels count; where the batch has them, ``kept`` [B, S, N] among which ids they were drawn,
    and ``teacher_ids`` [B, S, K] which further ids of each position are scored.
    """

    vocabulary: Vocabulary

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [3, B, S]: ``LOGPROB``, ``ENTROPY``, ``CORRECT``; further ids lie behind the first: [3 + K, B, S]."""
        kept, ids = fields.get("kept"), fields.get("teacher_ids")
        labels = fields["labels"] if ids is None else torch.cat([fields["labels"][..., None], ids], dim=-1)
        scores = vocab_parallel_scores(
            hidden,
            weight,
            sequence_first(labels),
            sequence_first(fields["loss_mask"]),
            group=group,
            vocabulary=self.vocabulary,
            kept=None if kept is None else sequence_first(kept),
        )
        return batch_first(scores, *labels.shape[:2])


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states themselves: what a running teacher gives to ``TokenDivergence``."""

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [B, S, H]."""
        batch, sequence = fields["labels"].shape
        return hidden.view(sequence, batch, -1).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class TokenDivergence:
    """How far every token's distribution is from a teacher's; see ``vocab_parallel_divergence``.

    The batch has the teacher's ``teacher_hidden`` [B, S, G].

    Args:
        beta: of the divergence.
        teacher_weight: gives this rank's rows [V_l, G] of the teacher's output matrix.
    """

    vocabulary: Vocabulary
    beta: float
    teacher_weight: Callable[[], Tensor]

    def __call__(self, hidden: Tensor, weight: Tensor, fields: Fields, group: Any) -> Tensor:
        """-> [6, B, S]: ``DIVERGENCE``, ``LOGPROB``, ``FORWARD``, ``REVERSE``, ``ENTROPY``, ``AGREEMENT``."""
        labels = fields["labels"]
        values = vocab_parallel_divergence(
            hidden,
            weight,
            sequence_first(labels),
            sequence_first(fields["loss_mask"]),
            teacher=Teacher(sequence_first(fields["teacher_hidden"]), self.teacher_weight()),
            beta=self.beta,
            group=group,
            vocabulary=self.vocabulary,
        )
        return batch_first(values, *labels.shape)


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
        # Each rank multiplies its own tokens: core then adds the gradient up over tp, as it does for norms.
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
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
