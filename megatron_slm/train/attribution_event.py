"""What one rank has found that is not finite, and where that stands in the causal order of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATE, INPUT, PASS, ACCUMULATION, REDUCTION = range(5)
"""The first number of ``Event.order``: what comes earlier can be the cause of what comes later, never the reverse."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Values of one tensor of one rank that are not finite, where nothing before them on that rank was so.

    Attributes:
        order: position in the causal order of one data-parallel replica, comparable between its ranks.
        phase: "parameter", "optimizer state", "input", "forward", "backward" or "reduction".
        module: global name, layers counted from 0 over the whole model.
        tensor: what of the module.
        nonfinite, total: elements.
        micro_batch: of the step, counted from 0 on the rank; None where it concerns all of them.
        samples: names of the micro-batch's samples.
    """

    order: tuple[int, ...]
    phase: str
    module: str
    tensor: str
    nonfinite: int
    total: int
    micro_batch: int | None = None
    samples: tuple[str, ...] = ()


def count_nonfinite(tensor: Tensor) -> int:
    """Elements that are NaN or infinite. Waits for the device."""
    return 0 if not tensor.is_floating_point() else int(torch.isfinite(tensor.detach()).logical_not().sum())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a module's arguments or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
