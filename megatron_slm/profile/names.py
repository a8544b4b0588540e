"""How the ranges of a profile are called: written while a run is profiled, read when a trace is. No torch.

Each is ``kind: name``. A step holds phases, which divide it without a gap; forward and backward hold micro-batches,
those hold modules, and any of them holds collectives. Modules and micro-batches name their direction last.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STEP, PHASE, MICRO_BATCH, MODULE, COLLECTIVE, RANK = "step", "phase", "micro-batch", "module", "collective", "rank"
KINDS = frozenset({STEP, PHASE, MICRO_BATCH, MODULE, COLLECTIVE, RANK})

DATA, FORWARD_BACKWARD, REDUCTION = "data", "forward and backward", "gradient reduction"
JUDGED, OPTIMIZER, BETWEEN = "gradient norm", "optimizer", "between steps"
PHASES = (DATA, FORWARD_BACKWARD, REDUCTION, JUDGED, OPTIMIZER, BETWEEN)
"""In their order; the gradient reduction lies in forward and backward, and "between steps" after the step."""

FORWARD, BACKWARD, RECOMPUTED = "forward", "backward", "recomputed"


class Label(NamedTuple):
    """Kind and name of a range."""

    kind: str
    name: str

    @property
    def text(self) -> str:
        """As it stands in a trace."""
        return f"{self.kind}: {self.name}"


class Exchanged(NamedTuple):
    """What a collective does.

    Attributes:
        operation: in torch's words, such as "all_reduce".
        axis: of its group, such as "tp"; "world" for all ranks.
        size: bytes that this rank hands in, or is handed by a receive.
    """

    operation: str
    axis: str
    size: int


def axis_of(operation: str, axis: str) -> str:
    """The axis that an exchange serves: two pipeline stages send over the group of all ranks, beside their own."""
    return "pp" if axis == "world" and operation in ("send", "recv", "send/recv") else axis


def label_of(text: str) -> Label | None:
    """The label that a text of a trace is; None for somebody else's."""
    kind, colon, name = text.partition(": ")
    return Label(kind, name) if colon and kind in KINDS else None


def micro_batch(number: int, direction: str, chunk: int | None) -> Label:
    """A micro-batch, counted from 0 in a step, through one chunk; ``chunk`` is None where a rank has but one."""
    where = "" if chunk is None else f" chunk {chunk}"
    return Label(MICRO_BATCH, f"{number}{where} {direction}")


def module(name: str, direction: str) -> Label:
    """A module by its path, layers counted over the whole model."""
    return Label(MODULE, f"{name} {direction}")


def collective(exchanged: Exchanged) -> Label:
    """A collective while it is asked for."""
    return Label(COLLECTIVE, f"{exchanged.operation} {exchanged.axis} {exchanged.size} bytes")


def exchanged_of(name: str) -> Exchanged:
    """What :func:`collective` has written."""
    operation, axis, size, _ = name.split(" ")
    return Exchanged(operation, axis, int(size))


def rank_label(rank: int, world_size: int) -> Label:
    """Whose profile it is."""
    return Label(RANK, f"{rank} of {world_size}")


def rank_of(name: str) -> int:
    """What :func:`rank_label` has written."""
    return int(name.partition(" ")[0])


def without_numbers(name: str) -> str:
    """The same for every layer: ``decoder.layers.3.mlp forward`` -> ``decoder.layers.*.mlp forward``."""
    return re.sub(r"(?<=\.)\d+(?=[. ])", "*", name)
