"""A reward model from preference pairs.

With r the scalar at the last label of a side that counts, m the pair's margin and c the centring coefficient, over the
P pairs of the whole global batch

    1/P sum of -log sigmoid(r_chosen - r_rejected - m) + c (r_chosen + r_rejected)^2

The first term is Bradley and Terry's likelihood (InstructGPT, arXiv 2203.02155, equation 1) with the margin of Llama 2
(arXiv 2307.09288, equation 2), the second keeps the rewards around 0 (arXiv 2312.09244, equation 2).

Shapes: B micro-batch, S sequence of this cp rank, P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages.config import RewardConfig
from megatron_slm.stages.segments import Loss, Segments, last_labels, logged_pair, pairs, segments_of

LOGGED = ("loss", "accuracy", "margin", "mean_reward")
"""What ``loss`` logs: TRL's names."""


def loss(output: Tensor, batch: Batch, *, config: RewardConfig, cp: Any = None) -> Loss:
    """(sum of the loss, pairs, what to log). Collective over ``cp``.

    Args:
        output: [B, S] of ``Scalar``.
        batch: ``loss_mask``, ``segments``, ``position_ids`` [B, S], and ``margins`` where the margin is used: the
            pair's, at every label of the chosen side.
        cp: the context-parallel group.
    """
    segments = segments_of(batch, cp)
    last = last_labels(segments, batch["position_ids"])
    chosen, rejected = pairs(rewards(output, segments, last))
    present = pairs(segments.present)[0]
    difference = chosen - rejected
    margins = torch.zeros_like(difference)
    if config.reward_margin:
        margins = pairs(rewards(batch["margins"].to(output.dtype), segments, last))[0]
    losses = -logsigmoid(difference - margins) + config.center_rewards_coefficient * (chosen + rejected).square()
    total = torch.where(present, losses, 0.0).sum()
    count = segments.once(present.sum())
    found = {
        "loss": total,
        "accuracy": (present & (difference > 0)).sum(),
        "margin": difference.sum(),
        # Half of both sides is the mean over the sides of all pairs.
        "mean_reward": (chosen + rejected).sum() / 2,
    }
    logs = {name: logged_pair(segments.once(value), count) for name, value in found.items()}
    return total, count.to(torch.int), logs


def rewards(output: Tensor, segments: Segments, last: Tensor) -> Tensor:
    """[B, S] -> [N]: the value at the ``last`` label of each sequence; 0 where there is none."""
    return segments.sums(torch.where(last, output, 0.0))
