"""The order in which one pipeline rank takes micro-batches through its chunks. Arithmetic, no torch.

Equal to core 0.16.1's schedules (``pipeline_parallel/schedules.py``): 1F1B, and interleaved 1F1B of Narayanan et al.,
arXiv 2104.04473, with groups of as many micro-batches as there are pipeline ranks.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARD, BACKWARD, FINISH, UPDATE = "forward", "backward", "finish", "update"


class Turn(NamedTuple):
    """One thing that a rank does: FORWARD or BACKWARD of a micro-batch through a chunk, FINISH or UPDATE of a step."""

    name: str
    chunk: int
    micro_batch: int


def turns(pipeline_rank: int, stages: int, chunks: int, micro_batches: int) -> list[Turn]:
    """Everything a rank does in a step.

    Args:
        pipeline_rank: 0 to ``stages`` - 1.
        chunks: of this rank (vpp).
        micro_batches: of a step; with several chunks a multiple of ``stages``.
    """
    order = forward_order(stages, chunks, micro_batches)
    forward = [Turn(FORWARD, chunk, micro_batch) for micro_batch, chunk in order]
    backward = [Turn(BACKWARD, chunks - 1 - chunk, micro_batch) for micro_batch, chunk in order]
    ahead = warm_up(pipeline_rank, stages, chunks, micro_batches)
    found = forward[:ahead]
    for one, other in zip(forward[ahead:], backward, strict=False):
        found += [one, other]
    return [*found, *backward[len(forward) - ahead :], Turn(FINISH, 0, 0), Turn(UPDATE, 0, 0)]


def warm_up(pipeline_rank: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Forward passes before the first backward pass, that of the first steady pair not among them."""
    if stages == 1:
        return 0
    ahead = stages - pipeline_rank - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    return min(ahead, chunks * micro_batches)


def forward_order(stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of every forward pass: a group of ``stages`` micro-batches goes through all chunks."""
    return [
        (micro_batch, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]
