"""Held-out loss and perplexity through the training schedule, under any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.groups import is_last_pipeline_rank, sum_over_world_from
from megatron_slm.parallel.pipeline import Batch, LossFunction, run_schedule


@dataclass(frozen=True)
class HeldOut:
    """Mean of a loss over ``tokens`` held-out tokens (pairs, where a stage counts those).

    Attributes:
        others: means of what is logged beside the loss.
    """

    loss: float
    tokens: int
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf


def held_out(
    chunks: list[nn.Module],
    steps: Iterable[list[Batch]],
    loss: LossFunction,
    *,
    seq_length: int,
    groups: Any,
    device: torch.device,
    logged: Sequence[str] = ("lm loss",),
) -> HeldOut:
    """Evaluate ``steps`` (micro-batches of this rank, on the device). Collective; every rank gets the result.

    Dropout is off, and the random streams of training are untouched.

    Args:
        logged: of what ``loss`` logs; the loss itself first.
    """
    total = torch.zeros(len(logged), 2, dtype=torch.float64, device=device)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), gathered_parameters(chunks):
        for micro_batches in steps:
            entries = run_schedule(chunks, micro_batches, loss, forward_only=True, seq_length=seq_length, groups=groups)
            for entry in entries:
                total += torch.stack([entry[name] for name in logged])
    for chunk in chunks:
        chunk.train()
    # Each tp rank of the last pipeline stage holds the same sums: one of them counts.
    sums = sum_over_world_from(total, counts=is_last_pipeline_rank(groups) and groups.tp.rank() == 0).tolist()
    means = {name: mean / count if count else math.nan for name, (mean, count) in zip(logged, sums, strict=True)}
    return HeldOut(means.pop(logged[0]), round(sums[0][1]), means)
