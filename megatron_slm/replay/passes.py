"""What three passes over one step say that are not all equal: which of them was wrong, and where. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from megatron_slm.replay.diff import Divergence
from megatron_slm.replay.report import phase_name
from megatron_slm.replay.slots import Origins, Slot, began

PASSES = ("first", "second", "third")
Pair = tuple[int, int]
"""Numbers of two passes, the smaller first."""


class Fault(NamedTuple):
    """What three passes that are not all equal say.

    Attributes:
        struck: number of the pass that was wrong; None where all three differ.
        origins: the ranks at which it began.
        divergence: the first record that differs there.
    """

    struck: int | None
    origins: Origins
    divergence: Divergence


def judged(reports: Sequence[Mapping[Pair, Divergence | None]], replicas: Sequence[frozenset[int]]) -> Fault:
    """Which of three passes was wrong, and where that began.

    Args:
        reports: of every rank, its first difference between each two passes; some rank has one.
    """
    pairs = list(combinations(range(len(PASSES)), 2))
    parted = {pair: {rank: one for rank, own in enumerate(reports) if (one := own[pair]) is not None} for pair in pairs}
    equal = [pair for pair in pairs if not parted[pair]]
    struck = next(iter({0, 1, 2} - {*equal[0]})) if equal else None
    found = next(ranks for ranks in parted.values() if ranks)
    origins = began(found, replicas)
    first = min((found[rank] for group in origins for rank in group), key=Divergence.order)
    return Fault(struck, origins, first)


def fault_text(step: int, found: Fault, slots: Sequence[Slot]) -> str:
    """A sentence; ``slots`` are those of all ranks."""
    where = ", ".join(" or ".join(f"rank {rank} on {slots[rank]}" for rank in sorted(group)) for group in found.origins)
    first = found.divergence
    what = f"{where}, {phase_name(first.key.phase)}, {first.tensor}"
    if found.struck is None:
        return f"step {step}: forward and backward, made three times, gave three results, which part at {what}."
    return (
        f"step {step}: forward and backward were made again, and the {PASSES[found.struck]} of three passes differs "
        f"from the other two: a transient fault at {what}."
    )
