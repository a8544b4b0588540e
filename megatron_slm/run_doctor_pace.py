"""Who is slow: every rank's pace, every link of the ring of ranks, every group of the layout. Rank 0 judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_slm import run_doctor_measure as measured
from megatron_slm.doctor import exchanges, pace
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.cluster import Cluster
from megatron_slm.run_doctor_ranks import STAGE_S, World, new_group

ROUNDS, CONFIRMATIONS = 2, 3
"""Times that everything is timed, and times more that what looks slow is timed again before it is named."""
WAITED = 0.2
"""Share of its time that a rank may wait for a core, beyond what the ranks explain, before that is said of it."""


def examine_pace(world: World) -> None:
    """Products and memory, on all ranks at the same time: whatever else a machine does then is the same for all."""
    flops, copied = measured.product_flops(world.device), measured.STREAM_BYTES[world.device]
    shown: dict[str, Callable[[float], str]] = {
        "matrix product": lambda seconds: f"{flops / seconds / 1e9:.4g} GFLOP/s",
        "memory": lambda seconds: f"{copied / seconds / 1e9:.3g} GB/s",
    }
    timed = {"matrix product": measured.product, "memory": measured.copy}

    def work() -> dict[str, tuple[float, float | None]]:
        found = {}
        for name, one in timed.items():
            dist.barrier()
            found[name] = one(world.device)
        return found

    best: dict[str, dict[int, pace.Timed]] = {name: {} for name in timed}

    def evened() -> dict[str, dict[int, float]]:
        return {name: pace.evened(own, world.same_cores) for name, own in best.items()}

    def again(attempt: int) -> bool:
        slow = any(pace.slow_ranks(seconds, world.ranks) for seconds in evened().values())
        return attempt < ROUNDS or (slow and attempt < ROUNDS + CONFIRMATIONS)

    attempt = 0
    while world.board.agreed(f"pace {attempt} is wanted", partial(again, attempt), STAGE_S):
        for rank, answer in world.answers(f"pace {attempt}", work).items():
            for name, (seconds, waited) in answer.items():
                new = pace.Timed(seconds, waited if world.device == "cpu" else None)
                best[name][rank] = min(new, best[name].get(rank, new), key=lambda one: one.seconds)
        waits = {rank: one.waited for rank, one in best["matrix product"].items() if one.waited is not None}
        world.busy = pace.busy(waits, world.crowded)
        attempt += 1
    if world.first:
        if world.busy:
            world.results.append(pace.busy_result(waits, world.crowded))
        why = {
            rank: f"it waited {100 * share:.0f} % of the time for a core"
            for rank, share in waits.items()
            if share > world.crowded + WAITED
        }
        for name, seconds in evened().items():
            world.results += pace.pace_results(name, seconds, world.ranks, shown[name], why)


def examine_pairs(world: World, group: Any) -> None:
    """Every rank with the next one, and all again while one looks slow; then whom it is that is slow.

    Args:
        group: of all ranks.
    """
    known: dict[pace.Pair, pace.Ping] = {}

    def ask(name: str, rounds: Sequence[Sequence[pace.Pair]]) -> None:
        def work() -> list[tuple[pace.Pair, float, float]]:
            own = measured.pings(rounds, world.rank, world.device, group)
            return [(pair, ping.seconds, ping.gb_per_second) for pair, ping in own.items()]

        for answer in world.answers(name, work).values():
            for (first, second), seconds, rate in answer:
                ping = pace.Ping(seconds, rate)
                known[first, second] = ping.best(known.get((first, second), ping))

    def slow() -> dict[pace.Pair, str]:
        return pace.slow_pairs(known, world.ranks)

    if world.environment.world_size == 1:
        return
    for attempt in range(1 + CONFIRMATIONS):
        # All of them, not the slow ones alone: what is timed more often comes out better.
        if world.board.agreed(f"pairs {attempt} are wanted", lambda: not known or bool(slow()), STAGE_S):
            ask(f"pairs {attempt}", pace.ring(world.environment.world_size))
    witnesses = world.board.agreed("witnesses", lambda: pace.questions(known, slow(), world.ranks), STAGE_S)
    if witnesses:
        ask("witnesses are heard", [[(first, second)] for first, second in witnesses])
    if world.first:
        world.results += pace.pair_results(known, slow(), world.ranks)


def examine_collectives(world: World) -> None:
    """Every axis of the layout, and all ranks together; what looks slow again."""
    layout = Layout.from_config(world.examination.config.parallel, world.environment.world_size)
    if layout.world_size == 1:
        return
    cluster = measured.known_cluster(world.device)
    for axis, what in measured.axes(layout):
        timed = _axis(world, axis, what, measured.members(layout, axis, world.rank), cluster)
        if world.first:
            world.results += exchanges.results(timed, _slow_groups(world, timed))


def _axis(world: World, axis: str, what: str, ranks: tuple[int, ...], cluster: Cluster | None) -> list[exchanges.Timed]:
    """All groups of one axis at once; on rank 0 the best of each.

    Args:
        ranks: of this rank's group.
    """
    best: dict[tuple[int, ...], exchanges.Timed] = {}
    made: list[Any] = []

    def work() -> dict[str, Any] | None:
        if not made:
            made.append(new_group(ranks, world.backend))
        timed = measured.collective(axis, what, ranks, made[0], world.rank, device=world.device)
        return dataclasses.asdict(timed) if world.rank == ranks[0] else None

    def again(attempt: int) -> bool:
        return attempt == 0 or (attempt <= CONFIRMATIONS and bool(_slow_groups(world, list(best.values()))))

    attempt = 0
    while world.board.agreed(f"{axis} {attempt} is wanted", partial(again, attempt), STAGE_S):
        for record in world.answers(f"{axis} {what} {attempt}", work).values():
            if record is not None:
                timed = _timed(record, cluster, world.hosts)
                best[timed.ranks] = min(best.get(timed.ranks, timed), timed, key=lambda one: one.large_seconds)
        attempt += 1
    return list(best.values())


def _slow_groups(world: World, timed: Sequence[exchanges.Timed]) -> list[exchanges.Timed]:
    return [] if world.busy else exchanges.slow_groups(timed)


def _timed(record: Mapping[str, Any], cluster: Cluster | None, hosts: Sequence[str]) -> exchanges.Timed:
    timed = exchanges.Timed(**{**record, "ranks": tuple(record["ranks"])})
    return dataclasses.replace(timed, expected_seconds=measured.expected_seconds(timed, cluster, hosts))
