"""How far two layouts may differ: a multiple of what rounding alone does to the one-rank job.

The one-rank job is run again with every weight moved by one unit in the last place and the micro-batches in reverse.
What that changes is what reassociation may change. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FACTOR = {"fp64": 16.0, "fp32": 16.0, "bf16": 4.0}
"""Layouts round at other places than the perturbed runs do, and those are only two draws. In bf16 a unit in the last
place of every weight is more than layouts differ by, so less will do."""

FLOOR = 64.0
"""In units of the precision: a sum that happens not to move leaves no tolerance otherwise."""

EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23}
"""bf16 jobs add and update in fp32; their own rounding shows in the perturbed runs."""


class Unit(NamedTuple):
    """The precision a claim is judged in."""

    precision: str
    """"fp64", "fp32" or "bf16"."""

    @property
    def epsilon(self) -> float:
        """Of a sum."""
        return EPSILON["fp64" if self.precision == "fp64" else "fp32"]

    def tolerance(self, noise: float, *, after_norm: bool = False) -> float:
        """The largest error that still counts as equal, relative.

        Args:
            noise: the largest error among the perturbed runs.
            after_norm: of the gradient norm, which core takes in fp32 in any precision, and of what it clips.
        """
        return max(FACTOR[self.precision] * noise, FLOOR * (EPSILON["fp32"] if after_norm else self.epsilon))


def by_kind(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Largest error of each kind of tensor over several perturbed runs: all layers' and experts' count as one kind."""
    worst: dict[str, float] = {}
    for run in errors:
        for name, error in run.items():
            worst[kind(name)] = max(worst.get(kind(name), 0.0), error)
    return worst


def kind(name: str) -> str:
    """A tensor's or module's name without the numbers in it."""
    return re.sub(r"\d+", "*", name)
