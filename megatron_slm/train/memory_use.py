"""How much memory this process holds, from the source that knows: CUDA's allocator, or the operating system."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class MemoryUse:
    """``peak_bytes`` since the process began, and TensorBoard tags with what is known now."""

    peak_bytes: int
    tags: dict[str, int]


def memory_source(device: str) -> Callable[[], MemoryUse]:
    """The function that reads the memory of this process.

    Args:
        device: ``cuda`` reads torch's caching allocator of the current device; ``cpu`` the resident set.
    """
    return _cuda_memory if device == "cuda" else _resident_memory


def _cuda_memory() -> MemoryUse:
    import torch

    # One table instead of four calls, each of which would build it.
    stats = torch.cuda.memory_stats()
    peak = int(stats["allocated_bytes.all.peak"])
    tags = {
        "mem-reserved-bytes": int(stats["reserved_bytes.all.current"]),
        "mem-allocated-bytes": int(stats["allocated_bytes.all.current"]),
        "mem-max-allocated-bytes": peak,
        "mem-allocated-count": int(stats["allocation.all.current"]),
    }
    return MemoryUse(peak, tags)


def _resident_memory() -> MemoryUse:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    resident = psutil.Process().memory_info().rss
    return MemoryUse(peak, {"mem-resident-bytes": resident, "mem-max-resident-bytes": peak})
