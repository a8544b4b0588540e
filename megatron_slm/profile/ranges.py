"""Named ranges of a run, given to torch's profiler and to NVTX alike: what is open, and in which order it closes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from megatron_slm.errors import LaunchError
from megatron_slm.profile.names import Label


class Emitter(Protocol):
    """Takes ranges. Pushed ones end in the thread that began them; started ones wherever."""

    def push(self, text: str) -> Any:
        """Begin a range of this thread; gives what ``pop`` needs."""

    def pop(self, opened: Any) -> None:
        """End the thread's innermost range."""

    def start(self, text: str) -> Any:
        """Begin a range that another thread may end; gives what ``end`` needs."""

    def end(self, opened: Any) -> None:
        """End it."""


class TorchRanges:
    """Ranges in the trace of torch's profiler."""

    def push(self, text: str) -> Any:
        opened = torch.profiler.record_function(text)
        opened.__enter__()
        return opened

    def pop(self, opened: Any) -> None:
        opened.__exit__(None, None, None)

    start, end = push, pop


class DeviceNvtx:
    """NVTX as the CUDA build of torch has it; works without a driver too."""

    def push(self, text: str) -> Any:
        torch.cuda.nvtx.range_push(text)

    def pop(self, opened: Any) -> None:
        torch.cuda.nvtx.range_pop()

    def start(self, text: str) -> Any:
        return torch.cuda.nvtx.range_start(text)

    def end(self, opened: Any) -> None:
        torch.cuda.nvtx.range_end(opened)


class HostNvtx:
    """NVTX by the package ``nvtx``, for ranks without CUDA."""

    def __init__(self) -> None:
        """Import it.

        Raises:
            LaunchError: it is not installed.
        """
        try:
            self._nvtx: Any = importlib.import_module("nvtx")
        except ImportError:
            raise LaunchError(
                f"torch {torch.__version__} is built without CUDA, so its NVTX ranges are missing; pip install nvtx, "
                "or profile with profile.profile_tools=torch"
            ) from None

    def push(self, text: str) -> Any:
        self._nvtx.push_range(text)

    def pop(self, opened: Any) -> None:
        self._nvtx.pop_range()

    def start(self, text: str) -> Any:
        return self._nvtx.start_range(text)

    def end(self, opened: Any) -> None:
        self._nvtx.end_range(opened)


def nvtx_emitter() -> Emitter:
    """NVTX by torch where its build has it, else by the package.

    Raises:
        LaunchError: there is neither.
    """
    return DeviceNvtx() if torch.version.cuda is not None else HostNvtx()


class _Open(NamedTuple):
    token: int
    threads: bool
    opened: list[Any]


class Ranges:
    """The ranges of one rank, each inside of the one before: a step is one sequence, whichever threads do it."""

    def __init__(self, emitters: Sequence[Emitter]) -> None:
        self._emitters = emitters
        self._stack: list[_Open] = []
        self._tokens = 0

    def open(self, label: Label, *, threads: bool = False) -> int:
        """Begin a range inside of what is open; gives what ``close`` needs.

        Args:
            threads: another thread may end it, as autograd's do.
        """
        self._tokens += 1
        text = label.text
        opened = [emitter.start(text) if threads else emitter.push(text) for emitter in self._emitters]
        self._stack.append(_Open(self._tokens, threads, opened))
        return self._tokens

    def close(self, token: int) -> None:
        """End a range and what is still open inside of it; nothing happens where it has ended already."""
        if not any(one.token == token for one in self._stack):
            return
        while True:
            last = self._stack.pop()
            for emitter, opened in zip(reversed(self._emitters), reversed(last.opened), strict=True):
                (emitter.end if last.threads else emitter.pop)(opened)
            if last.token == token:
                return

    def close_all(self) -> None:
        """End whatever is open."""
        if self._stack:
            self.close(self._stack[0].token)
