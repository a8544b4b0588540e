"""Ranges close in the order in which they were opened, and collectives are seen only for as long as somebody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_slm.profile.collectives import OPERATIONS, collective_ranges
from megatron_slm.profile.names import Label
from megatron_slm.profile.ranges import Ranges


class Written:
    """Takes ranges, and writes down what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def push(self, text: str) -> Any:
        self.lines.append(f"push {text}")

    def pop(self, opened: Any) -> None:
        self.lines.append("pop")

    def start(self, text: str) -> Any:
        self.lines.append(f"start {text}")
        return text

    def end(self, opened: Any) -> None:
        self.lines.append(f"end {opened}")


def test_a_range_takes_those_inside_of_it_along() -> None:
    written = Written()
    ranges = Ranges([written])
    step = ranges.open(Label("step", "1"))
    backward = ranges.open(Label("micro-batch", "0 backward"), threads=True)
    inside = ranges.open(Label("collective", "send pp 4 bytes"))
    ranges.close(backward)
    ranges.close(inside)
    assert written.lines == [
        "push step: 1",
        "start micro-batch: 0 backward",
        "push collective: send pp 4 bytes",
        "pop",
        "end micro-batch: 0 backward",
    ], "closed once, and what has ended already is left alone"
    ranges.close_all()
    ranges.close(step)
    assert written.lines[5:] == ["pop"]


def test_every_tool_is_told() -> None:
    tools = [Written(), Written()]
    ranges = Ranges(tools)
    ranges.close(ranges.open(Label("phase", "data")))
    assert tools[0].lines == tools[1].lines == ["push phase: data", "pop"]


def registered(operation: str) -> bool:
    return "AutogradCPU: registered" in torch._C._dispatch_dump(f"c10d::{operation}")


def test_nothing_of_the_dispatcher_stays_changed() -> None:
    import torch.distributed  # noqa: F401  it has the ops

    assert not any(map(registered, OPERATIONS)), "torch has a kernel of its own there now, which ours would replace"
    with collective_ranges(Ranges([]), {}):
        assert all(map(registered, OPERATIONS))
    assert not any(map(registered, OPERATIONS))
    with pytest.raises(ValueError, match="mine"), collective_ranges(Ranges([]), {}):
        raise ValueError("mine")
    assert not any(map(registered, OPERATIONS))
