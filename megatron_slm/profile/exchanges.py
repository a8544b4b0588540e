"""Which collective of ours an exchange in a trace is: its axis and its bytes. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from megatron_slm.profile.names import Exchanged
from megatron_slm.profile.trace import Exchange

UNKNOWN = "unknown"
"""Axis of an exchange that nobody has named."""
_KERNELS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "sendrecv": "send/recv",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
"""Part of the name of an NCCL kernel -> operation; the longer names first."""
_BY_MOMENT = ("send/recv", "exchange")
"""One kernel serves several collectives: the moment alone tells which."""
_AHEAD = 8
"""So many exchanges of a kind may be on their way at once."""


class Asked(NamedTuple):
    """A collective while the host has asked for it."""

    start: int
    end: int
    exchanged: Exchanged


def is_exchange_kernel(name: str) -> bool:
    """Whether a kernel moves data between ranks: NCCL's, and NVSHMEM's and DeepEP's that start with those words."""
    return name.startswith(("nccl", "nvshmem", "deep_ep")) or "ncclDevKernel" in name or "ncclKernel" in name


def kernel_operation(name: str) -> str:
    """The operation of an NCCL kernel, by its name."""
    lower = name.lower()
    return next((operation for part, operation in _KERNELS.items() if part in lower), "exchange")


def matched(exchanges: Sequence[Exchange], asked: Sequence[Asked]) -> list[Exchange]:
    """The exchanges in their order, with the axis and the bytes of the collective that each one is.

    Both begin in the order in which they were asked for, so that the first of a kind and a size belongs to the first.
    An exchange of a kind that nobody has asked for takes the last collective before it.
    """
    waiting: dict[str, list[Asked]] = defaultdict(list)
    for one in sorted(asked, reverse=True):
        waiting[one.exchanged.operation].append(one)
    ordered = sorted(asked)
    starts = [one.start for one in ordered]
    found = []
    for exchange in sorted(exchanges, key=lambda one: (one.issued, one.start)):
        own = _own(exchange, waiting)
        if own is None and (index := bisect_right(starts, exchange.issued)) and not exchange.axis:
            own = ordered[index - 1]
        found.append(_named(exchange, own))
    return found


def _named(exchange: Exchange, own: Asked | None) -> Exchange:
    if own is None:
        return exchange._replace(axis=exchange.axis or UNKNOWN)
    operation, axis, size = own.exchanged
    return exchange._replace(
        operation=operation if exchange.operation in _BY_MOMENT else exchange.operation,
        axis=exchange.axis or axis,
        size=exchange.size or size,
    )


def _own(exchange: Exchange, waiting: dict[str, list[Asked]]) -> Asked | None:
    """Takes the collective out of those that wait for their exchange, the earliest of which stand last."""
    row = waiting.get(exchange.operation, [])
    if exchange.operation in _BY_MOMENT or not row or row[-1].start > exchange.issued:
        return None
    for index in range(len(row) - 1, max(-1, len(row) - 1 - _AHEAD), -1):
        if row[index].start > exchange.issued:
            break
        if not exchange.size or row[index].exchanged.size == exchange.size:
            return row.pop(index)
    return row.pop()
