"""How far the log-probabilities of generation and of training are apart, measured on every rollout before it is used.

Both come from the same modules here, so that rounding alone should part them. A larger gap means that the policy that
has drawn is not the one that learns: other weights, another temperature or vocabulary, a cache that is wrong. Every
ratio of a policy loss would begin away from 1 and the loss would not show it.

Shapes: B rows of a batch, S labels of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.errors import RolloutError
from megatron_slm.rollout.config import GapLimits

WORST_KEPT = 5


class SequenceGap(NamedTuple):
    """The gap of one completion."""

    sample: int
    largest: float
    """Largest absolute difference of a token, in nats; NaN where one of the two numbers is none."""
    total: float
    """Sum of the differences, training minus generation: the logarithm of the sequence's ratio."""


class Gap(NamedTuple):
    """The gap of a rollout."""

    tokens: int
    absolute_sum: float
    signed_sum: float
    largest: float
    sequence_ratio: float
    """The largest ratio of a whole sequence, or of its inverse: exp |sum of differences|; at least 1."""
    worst: tuple[SequenceGap, ...]
    """The sequences with the largest differences, the worst first."""

    @property
    def mean(self) -> float:
        """Mean absolute difference of a token, in nats; 0 without tokens."""
        return self.absolute_sum / self.tokens if self.tokens else 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged, by name."""
        return {
            "rollout/logp_diff_mean": self.mean,
            "rollout/logp_diff_max": self.largest,
            "rollout/seq_ratio_max": self.sequence_ratio,
        }


def measure(trained: Tensor, generated: Tensor, segments: Tensor, samples: Sequence[int]) -> Gap:
    """The gap of one batch.

    Args:
        trained: log-probability of each label in the training forward, [B, S] (``LOGPROB`` of ``TokenScores``, at the
            temperature of the draws and among the kept tokens).
        generated: the one it was drawn with, [B, S] (``Completion.logprobs``).
        segments: number of the completion that a label belongs to, [B, S]; -1 where it belongs to none.
        samples: the sample's number of each completion, by segment.
    """
    counted = segments >= 0
    owner = segments[counted].flatten().cpu()
    difference = (trained[counted].double() - generated[counted].double()).flatten().cpu()
    totals = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, owner, difference)
    largest = torch.zeros(len(samples), dtype=torch.float64).scatter_reduce_(0, owner, difference.abs(), "amax")
    gaps = [SequenceGap(*one) for one in zip(samples, largest.tolist(), totals.tolist(), strict=True)]
    return _gathered(len(difference), float(difference.abs().sum()), float(difference.sum()), gaps)


def joined(gaps: Iterable[Gap]) -> Gap:
    """The gap of a rollout from those of its parts: micro-batches, data-parallel ranks."""
    parts = list(gaps)
    whole = _gathered(
        sum(part.tokens for part in parts),
        math.fsum(part.absolute_sum for part in parts),
        math.fsum(part.signed_sum for part in parts),
        [one for part in parts for one in part.worst],
    )
    ratios = [part.sequence_ratio for part in parts]
    return whole._replace(sequence_ratio=max(ratios, key=_badness, default=1.0))


def _gathered(tokens: int, absolute_sum: float, signed_sum: float, gaps: Sequence[SequenceGap]) -> Gap:
    worst = sorted(gaps, key=lambda gap: _badness(gap.largest), reverse=True)[:WORST_KEPT]
    furthest = max((abs(gap.total) for gap in gaps), key=_badness, default=0.0)
    return Gap(
        tokens,
        absolute_sum,
        signed_sum,
        worst[0].largest if worst else 0.0,
        math.exp(min(furthest, 700.0)) if math.isfinite(furthest) else furthest,
        tuple(worst),
    )


def _badness(value: float) -> float:
    """An order in which NaN is the worst."""
    return math.inf if math.isnan(value) else value


def require(gap: Gap, limits: GapLimits) -> None:
    """Refuse a rollout whose gap is too large.

    Raises:
        RolloutError: names value, limit and the worst sample.
    """
    if not gap.mean <= limits.mean and gap.largest <= limits.largest:
        raise RolloutError(
            f"The log-probabilities of {gap.tokens} tokens differ by {gap.mean:.3g} nats on average between generation "
            f"and training, more than rollout.max_mean_logprob_gap={limits.mean:g} (largest {gap.largest:.3g}, of "
            f"sample {gap.worst[0].sample}). Nothing was learned from them. Look for weights, a temperature or a kept "
            "set that changed in between; if the number format explains it, raise rollout.max_mean_logprob_gap."
        )
    if gap.largest <= limits.largest:  # false for NaN
        return
    worst = ", ".join(f"{one.sample} ({one.largest:.3g})" for one in gap.worst)
    raise RolloutError(
        f"The log-probability of a token of sample {gap.worst[0].sample} differs by {gap.largest:.3g} nats between "
        f"generation and training, more than rollout.max_logprob_gap={limits.largest:g} (mean {gap.mean:.3g} over "
        f"{gap.tokens} tokens; worst samples {worst}). Nothing was learned from it. Look for weights that changed in "
        "between; if the number format explains it, raise rollout.max_logprob_gap."
    )
