"""Held-out loss and perplexity through the training schedule, under any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.groups import is_last_pipeline_rank, sum_over_world_from
from megatron_slm.parallel.pipeline import Batch, LossFunction, run_schedule


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats over ``tokens`` held-out tokens."""

    loss: float
    tokens: int

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
) -> HeldOut:
    """Evaluate ``steps`` (micro-batches of this rank, on the device). Collective; every rank gets the result.

    Dropout is off, and the random streams of training are untouched.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), gathered_parameters(chunks):
        for micro_batches in steps:
            logged = run_schedule(chunks, micro_batches, loss, forward_only=True, seq_length=seq_length, groups=groups)
            for entry in logged:
                total += entry["lm loss"]
    for chunk in chunks:
        chunk.train()
    # Each tp rank of the last pipeline stage holds the same sums: one of them counts.
    mean = sum_over_world_from(total, counts=is_last_pipeline_rank(groups) and groups.tp.rank() == 0).tolist()
    return HeldOut(loss=mean[0] / mean[1], tokens=round(mean[1]))
