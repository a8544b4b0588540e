"""What one layer does for one micro-batch on one rank, as a list of operations with shapes. No torch.

Closed forms of what core's modules run; ``tests/unit/test_plan_ops.py`` holds them against counts by hand. Shapes: S
sequence, B micro-batch, H hidden, T = S x B / cp tokens of a rank. Activations and parameters have 2 bytes
(``ELEMENT``); a planner for CPU development in fp32 is nobody's wish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

ELEMENT = 2
"""Bytes of an activation in bf16 or fp16."""

FP8_ELEMENT = 1
"""Bytes of one in FP8, without its scales."""

MAIN_GRADIENT = 4
"""Bytes of an accumulated gradient."""


@dataclass(frozen=True)
class Gemm:
    """``count`` products of m x k by k x n matrices."""

    name: str
    m: int
    n: int
    k: int
    count: float = 1
    accumulates: bool = False
    """A weight gradient that is added to an fp32 buffer."""
    fp8: bool = False
    """Both operands are in FP8."""

    @property
    def flops(self) -> float:
        """A multiply-add is two."""
        return 2.0 * self.m * self.n * self.k * self.count

    @property
    def bytes(self) -> float:
        """Operands read once, result written once (and read before, where it accumulates)."""
        result = 2 * MAIN_GRADIENT if self.accumulates else ELEMENT
        operand = FP8_ELEMENT if self.fp8 else ELEMENT
        return self.count * (operand * self.k * (self.m + self.n) + result * self.m * self.n)


@dataclass(frozen=True)
class Attention:
    """The two products of attention and the softmax between them, in one kernel."""

    name: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Streaming:
    """An op that does little but read and write memory: norms, activations, dropout, softmax, additions."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Exchange:
    """A collective or a send over one axis of the layout.

    ``bytes`` is S of the usual volume formulas: the full tensor of a reduction, gather or scatter; the local one of an
    all-to-all or a send.
    """

    name: str
    collective: str
    """``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``send``."""
    axis: str
    bytes: float
    behind: Gemm | Attention | None = None
    """What it runs beside; only what it takes longer is waited for."""
    times: int = 1
    """Equal exchanges, one after another."""


Op: TypeAlias = Gemm | Attention | Streaming | Exchange


@dataclass(frozen=True)
class Pass:
    """One forward and one backward pass of something, for one micro-batch."""

    forward: tuple[Op, ...] = ()
    backward: tuple[Op, ...] = ()

    def __add__(self, other: Pass) -> Pass:
        # The backward pass runs in the opposite order.
        return Pass(self.forward + other.forward, other.backward + self.backward)

    def recomputed(self) -> Pass:
        """The same with its forward pass run again before its backward pass."""
        return Pass(self.forward, self.forward + self.backward)
