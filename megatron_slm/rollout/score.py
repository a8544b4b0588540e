"""Scores of given tokens by a model, forward alone: a reference, the policy that made a rollout, a reward model.

Shapes: B micro-batch, S sequence of this cp rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.pipeline import Batch, run_schedule


def scores(chunks: list[nn.Module], micro_batches: list[Batch], *, seq_length: int, groups: Any) -> list[Tensor]:
    """What the model's ending gives for every micro-batch, without gradient or dropout. Collective over pp, tp and cp.

    Args:
        chunks: of this rank, wrapped for training or bare.
        micro_batches: on the device, cut by cp rank; as many on every rank.
        seq_length: S of all cp ranks.

    Returns:
        One tensor a micro-batch, [3, B, S] of ``TokenScores`` or [B, S] of ``Scalar``, on the ranks that end the model;
        empty elsewhere.
    """
    trained = [chunk for chunk in chunks if hasattr(chunk, "ddp_config")]
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), gathered_parameters(trained):
        found = run_schedule(chunks, micro_batches, _keep, forward_only=True, seq_length=seq_length, groups=groups)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    return [entry["output"] for entry in found]


def _keep(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss that hands on what it is given: core's schedule collects what it logs."""
    nothing = output.new_zeros(())
    return nothing, torch.ones((), dtype=torch.int, device=output.device), {"output": output.detach().clone()}
