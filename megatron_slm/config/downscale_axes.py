"""Which axes of a large job a few ranks can hold at once: degrees of two, in as few runs as show every pair of axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.config.run_config import RunConfig

HELD = 2
"""Degree of every axis that a downscaled run holds: the smallest at which ranks differ."""


@dataclass(frozen=True)
class Degrees:
    """Ranks on every axis of a job. ``etp`` is None where the experts' matrices are shared as all others are."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts (expert data parallelism)."""
        return self.tp * self.cp * self.dp // (self.ep * (self.etp or self.tp))

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of at least two ranks; ``edp`` counts where there is ``ep`` beside it."""
        held = [axis for axis in ("tp", "pp", "vpp", "cp", "dp", "ep") if getattr(self, axis) > 1]
        return (*held, *(["edp"] if self.ep > 1 and self.edp > 1 else []))

    def __str__(self) -> str:
        shown = [(axis, getattr(self, axis)) for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")]
        return "-".join(f"{axis}{size}" for axis, size in shown if (size or 1) > 1) or "one-rank"


def degrees_of(config: RunConfig, world_size: int | None = None) -> Degrees:
    """The degrees of a configuration.

    Args:
        world_size: ranks of the job; default ``parallel.world_size``, then the fewest that its degrees need.
    """
    parallel = config.parallel
    replica = parallel.model_parallel_size
    experts = (
        parallel.expert_tp_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
        if config.model.num_moe_experts
        else 1
    )
    world = world_size or parallel.world_size or math.lcm(replica, experts)
    return Degrees(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.vpp_size,
        cp=parallel.context_parallel_size,
        dp=max(1, world // replica),
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
    )


def runs(original: Degrees, ranks: int) -> tuple[Degrees, ...]:
    """Small jobs that together hold every axis of ``original``, and every pair of axes that fits.

    Args:
        ranks: the most that one job may have.
    """
    candidates = _candidates(original, ranks)
    missing = {pair for job in candidates for pair in _pairs(job)}
    chosen: list[Degrees] = []
    while missing or not chosen:
        # Ties go to the job of fewer ranks, then to the one that was listed first.
        best = max(candidates, key=lambda job: (len(_pairs(job) & missing), -job.world_size))
        chosen.append(best)
        missing -= _pairs(best)
    return tuple(chosen)


def missed_pairs(original: Degrees, held: Sequence[Degrees]) -> list[tuple[str, str]]:
    """Pairs of axes of ``original`` that no job of ``held`` has together."""
    shown = {pair for job in held for pair in _pairs(job)}
    return [pair for pair in itertools.combinations(original.axes, 2) if frozenset(pair) not in shown]


def _candidates(original: Degrees, ranks: int) -> list[Degrees]:
    """Every job of at most ``ranks`` that holds some axes of ``original`` and no other."""
    found: dict[Degrees, None] = {}
    for size in range(len(original.axes), -1, -1):
        for axes in itertools.combinations(original.axes, size):
            job = _job(original, axes)
            if job.world_size <= ranks and set(job.axes) <= set(original.axes):
                found[job] = None
    return list(found)


def _job(original: Degrees, axes: Sequence[str]) -> Degrees:
    """The smallest job with at least ``axes``; interleaving and expert options come with the axes they belong to.

    Experts that need more ranks than tp and cp have take replicas; where the original has none, more ranks of cp, or
    their matrices stay whole.
    """
    tp, pp, cp, ep = (HELD if axis in axes else 1 for axis in ("tp", "pp", "cp", "ep"))
    vpp = HELD if pp > 1 and original.vpp > 1 else 1
    etp = _expert_tp(original, tp) if ep > 1 or original.ep == 1 else None
    edp = HELD if "edp" in axes and ep > 1 else 1
    needed = _replicas(tp * cp, ep * (etp or tp) * edp) if ep > 1 or etp else 1
    if needed > 1 and original.dp == 1 and original.cp % (cp * needed) == 0:
        cp, needed = cp * needed, 1
    elif needed > 1 and original.dp == 1 and original.etp not in (None, original.tp):
        etp = None if tp == 1 else 1
        needed = _replicas(tp * cp, ep * edp)
    return Degrees(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=max(HELD if "dp" in axes else 1, needed), ep=ep, etp=etp)


def _replicas(ranks: int, experts: int) -> int:
    """Replicas of so many ranks that hold whole sets of expert ranks."""
    return math.lcm(experts, ranks) // ranks


def _expert_tp(original: Degrees, tp: int) -> int | None:
    """Ranks that share an expert's matrices in a job of ``tp``."""
    if original.etp is None or original.etp == original.tp:
        return None
    wanted = 1 if original.etp == 1 else HELD
    return None if wanted == tp else wanted


def _pairs(job: Degrees) -> set[frozenset[str]]:
    """What a job shows: its axes, alone and by twos."""
    return {frozenset(pair) for pair in itertools.combinations_with_replacement(job.axes, 2)}
