"""What ``mslm doctor`` times on every rank: products, memory, pairs of ranks, collectives of the layout's groups."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.doctor.exchanges import Timed
from megatron_slm.doctor.pace import Pair, Ping
from megatron_slm.parallel.device import device_name, synchronize
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan import measure
from megatron_slm.plan.cluster import CLUSTERS, Cluster
from megatron_slm.plan.cost import Costs
from megatron_slm.plan.links import Span, volume
from megatron_slm.plan.rates import PUBLISHED

SIDE = {"cuda": 8192, "cpu": 384}
"""Of the square product: large enough to be the device's own pace, short beside a scheduler's slice."""
STREAM_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
PING_BYTES = {"cuda": 1 << 26, "cpu": 1 << 20}
SMALL_BYTES = 1 << 10
LARGE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
SMALL_PINGS, LARGE_PINGS, WARM_UP = 20, 5, 2
WINDOW_S = 0.2
"""Of one look at a rank's pace: many of a scheduler's slices."""
SCHEDULER = Path("/proc/thread-self/schedstat")


def product(device: str) -> tuple[float, float | None]:
    """Of one square matrix product (bf16 on a GPU, fp32 on a core): see :func:`_pace`."""
    side, kind = SIDE[device], torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(side, side, dtype=kind, device=device) for _ in range(2))
    return _pace(partial(torch.matmul, left, right), device)


def product_flops(device: str) -> float:
    """Of that product."""
    return 2.0 * SIDE[device] ** 3


def copy(device: str) -> tuple[float, float | None]:
    """Of copying one half of ``STREAM_BYTES`` to the other: see :func:`_pace`."""
    source = torch.zeros(STREAM_BYTES[device] // 8, dtype=torch.float32, device=device)
    return _pace(partial(torch.empty_like(source).copy_, source), device)


def _pace(work: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds of one call, on average over a fixed time; and the share of it that the thread waited for a core.

    No median: beside another process on its core most calls are undisturbed, and a few take a scheduler's slice. And no
    fixed number of calls, which could fall between two slices. The share is None where the system does not count it.
    """
    for _ in range(WARM_UP):
        work()
    synchronize(device)
    calls, before, start = 0, _waited_s(), time.perf_counter()
    while (seconds := time.perf_counter() - start) < WINDOW_S:
        work()
        synchronize(device)
        calls += 1
    after = _waited_s()
    return seconds / calls, None if before is None or after is None else (after - before) / seconds


def _waited_s() -> float | None:
    """Of this thread, for a core, since it began (Linux: Documentation/scheduler/sched-stats)."""
    try:
        return int(SCHEDULER.read_text(encoding="utf-8").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def pings(rounds: Sequence[Sequence[Pair]], rank: int, device: str, group: Any) -> dict[Pair, Ping]:
    """This rank's pairs, round by round, timed by the first rank of each. All ranks call this with the same rounds."""
    found = {}
    for pairs in rounds:
        for pair in pairs:
            if rank in pair:
                small = _there_and_back(SMALL_BYTES, SMALL_PINGS, pair, rank, device, group=group)
                large = _there_and_back(PING_BYTES[device], LARGE_PINGS, pair, rank, device, group=group)
                if rank == pair[0]:
                    found[pair] = Ping(small, PING_BYTES[device] / large / 1e9)
    return found


def _there_and_back(size: int, times: int, pair: Pair, rank: int, device: str, *, group: Any) -> float:
    """Median seconds of a message one way: half of there and back."""
    message = torch.zeros(size // 4, dtype=torch.float32, device=device)
    first = rank == pair[0]
    peer = pair[1] if first else pair[0]
    seconds = []
    for _ in range(WARM_UP + times):
        synchronize(device)
        start = time.perf_counter()
        for sends in (first, not first):
            (dist.send if sends else dist.recv)(message, peer, group=group)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 2)
    return statistics.median(seconds[WARM_UP:])


def axes(layout: Layout) -> list[tuple[str, str]]:
    """(axis, its collective) of everything that has more than one rank; ``world`` is the first."""
    gradients = "dp-cp" if layout.context_parallel_size > 1 else "dp"
    all_axes = (("tp", "all_reduce"), ("cp", "send"), (gradients, "all_reduce"), ("pp", "send"), ("ep", "all_to_all"))
    return [("world", "all_reduce")] + [(axis, what) for axis, what in all_axes if len(members(layout, axis, 0)) > 1]


def members(layout: Layout, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks of this rank's group."""
    return tuple(range(layout.world_size)) if axis == "world" else layout.ranks_of(axis, rank)


def collective(axis: str, what: str, ranks: tuple[int, ...], group: Any, rank: int, *, device: str) -> Timed:
    """One collective on this rank's group, timed by all its members together.

    Args:
        ranks: members of ``group``.
        rank: this one.
    """
    place = torch.device(device)
    count = len(ranks)

    def seconds(size: int) -> tuple[int, float]:
        size = size // count * count
        work = (
            _send_round(size, ranks, rank, device, group=group)
            if what == "send"
            else measure.exchange(what, size, group, count, place)
        )
        return size, statistics.median(measure.repeated(work, device, group=group))

    _, small = seconds(SMALL_BYTES)
    size, large = seconds(LARGE_BYTES[device])
    return Timed(axis, what, ranks, small, large, size, volume(what, float(size), Span(count, count)).total)


def _send_round(size: int, ranks: tuple[int, ...], rank: int, device: str, *, group: Any) -> Callable[[], None]:
    """Every member sends to the next one, as pipeline stages and context parallelism do."""
    place = ranks.index(rank)
    out = torch.zeros(max(1, size // 4), dtype=torch.float32, device=device)
    into = torch.empty_like(out)
    operations = [
        dist.P2POp(dist.isend, out, ranks[(place + 1) % len(ranks)], group=group),
        dist.P2POp(dist.irecv, into, ranks[place - 1], group=group),
    ]

    def work() -> None:
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return work


def known_cluster(device: str) -> Cluster | None:
    """The planner's data sheet of this rank's GPU; None for a CPU or another GPU."""
    words = {"cpu"} if device == "cpu" else set(device_name(device).replace("-", " ").upper().split())
    return next((one for name, one in CLUSTERS.items() if name.partition("-")[0].upper() in words), None)


def expected_seconds(timed: Timed, cluster: Cluster | None, hosts: Sequence[str]) -> float | None:
    """Of the large message by the planner's links; None where they are not known."""
    if cluster is None:
        return None
    in_node = sum(hosts[member] == hosts[timed.ranks[0]] for member in timed.ranks)
    costs = Costs(cluster, PUBLISHED[cluster.architecture], Layout(world_size=len(hosts)))
    return costs.exchange_seconds(timed.collective, timed.large_bytes, Span(len(timed.ranks), in_node))
