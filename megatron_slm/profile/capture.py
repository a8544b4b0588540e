"""What a rank is profiled with: torch's profiler, Nsight Systems' capture range, the allocator's history."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from megatron_slm.profile.config import MEMORY, NSYS, TORCH
from megatron_slm.profile.ranges import Emitter, TorchRanges, nvtx_emitter

FOLDER = "profile"
METADATA = "mslm"
"""Key of a Chrome trace under which the rank, the world and the axes of its groups stand."""
_NSYS_VARIABLES = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH", "CUDA_INJECTION64_PATH")
"""One of them is set in a process that nsys has started."""
_HISTORY_EVENTS = 1_000_000


class Capture(Protocol):
    """One tool, around the profiled steps."""

    emitters: list[Emitter]

    def prepare(self) -> None:
        """Before the step before the first profiled one: what takes long to begin."""

    def start(self) -> None:
        """Before the first profiled step."""

    def stop(self) -> Path | None:
        """After the last one; gives the file that was written, if it was written here."""


class TorchCapture:
    """``rank-N.json.gz``: a Chrome trace of torch's profiler, of the host and of CUDA where there is some."""

    def __init__(self, folder: Path, rank: int, device: str, *, axes: Mapping[str, str], memory: bool) -> None:
        """``axes``: of the names of process groups; ``memory``: every allocation too."""
        self.emitters: list[Emitter] = [TorchRanges()]
        self._path = folder / f"rank-{rank}.json.gz"
        self._about = {"rank": rank, "host": socket.gethostname(), "axes": dict(axes)}
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        # Kineto would print a line of its own on every rank.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=memory)

    def prepare(self) -> None:
        self._profiler.prepare_trace()

    def start(self) -> None:
        self._profiler.start_trace()
        self._profiler.add_metadata_json(METADATA, json.dumps(self._about))

    def stop(self) -> Path | None:
        self._profiler.stop_trace()
        partial = self._path.with_name(f".{self._path.name}.part.json")
        self._profiler.export_chrome_trace(str(partial))
        with partial.open("rb") as plain, gzip.open(self._path, "wb", compresslevel=3) as packed:
            while block := plain.read(1 << 20):
                packed.write(block)
        partial.unlink()
        return self._path


class NsysCapture:
    """NVTX ranges, and cudaProfilerStart and -Stop, between which ``nsys profile`` records."""

    def __init__(self, device: str) -> None:
        """Raises LaunchError where there is no NVTX."""
        self.emitters: list[Emitter] = [nvtx_emitter()]
        self._on_gpu = device == "cuda"

    def prepare(self) -> None:
        """Nsys has begun with the process; where it has not, say so."""
        if self._on_gpu and not any(name in os.environ for name in _NSYS_VARIABLES):
            print(
                "profile: this rank was not started by nsys, so nothing is captured; see launch/nsight.sh", flush=True
            )

    def start(self) -> None:
        if self._on_gpu:
            torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> Path | None:
        if self._on_gpu:
            torch.cuda.cudart().cudaProfilerStop()
        return None


class MemoryCapture:
    """``rank-N.memory.pickle``: every allocation of the CUDA allocator with its stack, for pytorch.org/memory_viz."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.emitters: list[Emitter] = []
        self._path = folder / f"rank-{rank}.memory.pickle"

    def prepare(self) -> None:
        """Nothing."""

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_EVENTS)

    def stop(self) -> Path | None:
        torch.cuda.memory._dump_snapshot(str(self._path))
        torch.cuda.memory._record_memory_history(enabled=None)
        return self._path


def captures(tools: Sequence[str], folder: Path, rank: int, device: str, *, axes: Mapping[str, str]) -> list[Capture]:
    """The tools that were asked for, on this rank.

    Raises:
        LaunchError: NVTX was asked for and is missing.
    """
    on_gpu, memory = device == "cuda", MEMORY in tools
    found: list[Capture] = [NsysCapture(device)] if NSYS in tools else []
    if TORCH in tools or (memory and not on_gpu):
        found.append(TorchCapture(folder, rank, device, axes=axes, memory=memory and not on_gpu))
    if memory and on_gpu:
        found.append(MemoryCapture(folder, rank))
    return found


def remarks(tools: Sequence[str], device: str) -> list[str]:
    """What the tools cannot do on this device, a sentence each."""
    if device == "cuda":
        return []
    said = {
        NSYS: "profile: ranks without CUDA have no capture range for nsys; it would record them from start to end",
        MEMORY: "profile: CPU ranks have no snapshot of an allocator; the trace holds an event for each allocation",
    }
    return [said[tool] for tool in tools if tool in said]
