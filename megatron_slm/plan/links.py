"""Which links a group's bytes cross: inside a node or between nodes, from the map of ranks to nodes. No torch.

Ranks fill nodes in order, as every launcher numbers them; a layout's axes are in core's order (``parallel.layout``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_slm.parallel.layout import Layout


@dataclass(frozen=True)
class Span:
    """Where the members of one group are."""

    size: int
    """Ranks of the group."""
    in_node: int
    """Members in the node of the rank that asks, itself among them."""

    @property
    def crosses(self) -> bool:
        """Whether any member is in another node."""
        return self.in_node < self.size


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends, by link."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.inside + other.inside, self.between + other.between)

    def __mul__(self, times: float) -> Volume:
        return Volume(self.inside * times, self.between * times)

    @property
    def total(self) -> float:
        """Over both links."""
        return self.inside + self.between


@functools.lru_cache(maxsize=65536)
def span(layout: Layout, axis: str, rank: int, gpus_per_node: int) -> Span:
    """The group of ``rank`` on ``axis`` (one of the layout's, or several joined by a hyphen)."""
    ranks = layout.ranks_of(axis, rank)
    return Span(len(ranks), sum(member // gpus_per_node == rank // gpus_per_node for member in ranks))


def next_stage_crosses(layout: Layout, rank: int, gpus_per_node: int) -> bool:
    """Whether the same place of the next pipeline stage (of the last one: the first) is in another node."""
    stages = layout.pipeline_model_parallel_size
    following = (rank + layout.world_size // stages) % layout.world_size
    return following // gpus_per_node != rank // gpus_per_node


def ring_steps(collective: str, size: int) -> int:
    """Messages that follow one another in a collective of ``size`` ranks."""
    return {"all_reduce": 2 * (size - 1), "send": 1}.get(collective, size - 1)


def volume(collective: str, message_bytes: float, group: Span) -> Volume:
    """Bytes that one member sends in one collective.

    Reductions, gathers and scatters go round a ring that enters and leaves each node once, through every member's
    network link in turn: of what a member sends, one part in ``in_node`` leaves the node. An all-to-all sends every
    other member its part; a send goes round the ring (context parallelism) as well.

    Args:
        collective: as in :class:`megatron_slm.plan.ops.Exchange`.
        message_bytes: S: the full tensor of a reduction, gather or scatter, else the local one.
        group: the members.

    Raises:
        ValueError: there is no such collective.
    """
    size = group.size
    if size == 1:
        return Volume()
    if collective == "all_to_all":
        part = message_bytes / size
        return Volume(part * (group.in_node - 1), part * (size - group.in_node))
    shares = {"all_reduce": 2 * (size - 1) / size, "all_gather": (size - 1) / size, "reduce_scatter": (size - 1) / size}
    shares["send"] = 1.0
    if collective not in shares:
        raise ValueError(f"{collective} is no collective; they are all_to_all, {', '.join(shares)}.")
    sent = shares[collective] * message_bytes
    if not group.crosses:
        return Volume(inside=sent)
    return Volume(sent * (1 - 1 / group.in_node), sent / group.in_node)
