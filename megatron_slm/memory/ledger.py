"""Rows that say where every byte of a rank is at the worst moment of a step; they add up to the total, always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.rank import RankTrace
from megatron_slm.memory.replay import Timeline, alive_at_worst, saved_blocks
from megatron_slm.memory.schedule import BACKWARD, FORWARD
from megatron_slm.memory.static import WORKSPACE
from megatron_slm.memory.trace import COMMUNICATION, COPIES, Block
from megatron_slm.train.layer_norms import part_of

ACTIVATIONS, RECOMPUTED, LOGITS, ROUNDING = ("activations", "recompute", "logits and loss", "allocator rounding")
OUTPUT = ("output_layer", "")
"""Modules whose blocks are logits and loss; the loss itself is computed outside of every module."""


class Row(NamedTuple):
    """Bytes of one kind in one module of one rank.

    Attributes:
        layer: "layer_3", "embedding", "output_layer", "final_norm"; empty outside of the model.
        kind: parameters, gradients, master weights, moments, activations, recompute, logits and loss, communication
            buffers, weight copies, workspace, allocator rounding, NCCL, CUDA context, fragmentation.
        size: bytes at the worst moment.
        low, high: within which the truth is expected; equal to ``size`` where it is exact.
        begins, ends: turns of the schedule between which it is alive, by number; the whole step is 0 to the last.
    """

    rank: int
    pipeline_rank: int
    chunk: int
    layer: str
    module: str
    kind: str
    size: int
    low: int
    high: int
    begins: int
    ends: int


@dataclass(frozen=True)
class Ledger:
    """One rank's rows.

    Attributes:
        rows: inside of torch's allocator, then outside of it.
        timeline: of the step.
    """

    rank: int
    pipeline_rank: int
    rows: list[Row]
    timeline: Timeline
    surroundings: Surroundings | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes at the worst moment."""
        return sum(row.size for row in self.rows)

    @property
    def low(self) -> int:
        """The least that is expected."""
        return sum(row.low for row in self.rows)

    @property
    def high(self) -> int:
        """The most that is expected."""
        return sum(row.high for row in self.rows)

    @property
    def allocated(self) -> int:
        """Of it, what torch calls allocated."""
        return sum(row.size for row in self.rows if not row.kind.startswith(OUTSIDE))

    @property
    def verdict(self) -> str:
        """ "fits", "tight" or "does not fit"; empty where no device was named."""
        if self.surroundings is None or self.surroundings.capacity_bytes is None:
            return ""
        if self.low > self.surroundings.capacity_bytes:
            return "does not fit"
        return "fits" if self.high <= self.surroundings.capacity_bytes else "tight"

    def by_kind(self) -> dict[str, int]:
        """Bytes of every kind."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.kind] = found.get(row.kind, 0) + row.size
        return found


OUTSIDE = ("NCCL", "CUDA context", "fragmentation")
"""Kinds that torch does not call allocated."""


def ledger(trace: RankTrace, timeline: Timeline, surroundings: Surroundings | None = None) -> Ledger:
    """The rows of one rank.

    Args:
        surroundings: of the device: capacity, and what is not torch's; None on a CPU.
    """
    last = len(timeline.moments) - 1
    place = (trace.rank, trace.pipeline_rank)
    rows = [
        Row(*place, part.chunk, part_of(part.module), part.module, part.kind, part.size, part.size, part.size, 0, last)
        for part in trace.static
    ]
    rows += _dynamic(trace, timeline, surroundings)
    inside = sum(row.size for row in rows)
    if inside != timeline.peak_bytes:
        raise AssertionError(f"the rows of rank {trace.rank} add up to {inside}, not to {timeline.peak_bytes} bytes")
    if surroundings is not None:
        for kind, (low, size, high) in surroundings.beside(rounded_up(trace, timeline), inside).items():
            rows.append(Row(*place, 0, "", "", kind, size, low, high, 0, last))
    return Ledger(*place, merged(rows), timeline, surroundings)


def _dynamic(trace: RankTrace, timeline: Timeline, surroundings: Surroundings | None) -> list[Row]:
    """What is not there between steps."""
    error = surroundings.activation_error if surroundings is not None else 0.0
    saved, rows = saved_blocks(trace), []
    for number, copies in alive_at_worst(trace, timeline).items():
        block = trace.blocks[number]
        chunk = saved.get(number, timeline.moments[timeline.worst].turn.chunk)
        kind = kind_of(block, saved=number in saved, ends_model=trace.pipeline_rank == trace.stages - 1)
        begins, ends = _interval(timeline, chunk) if number in saved else (timeline.worst, timeline.worst)
        size = copies * block.size
        layer = part_of(block.module) if block.module else ""
        low, high = round(size * (1 - error)), round(size * (1 + error))
        if kind == COPIES:  # known to the byte, and there for good
            low, high, begins, ends = size, size, 0, len(timeline.moments) - 1
        place = (trace.rank, trace.pipeline_rank, chunk)
        rows.append(Row(*place, layer, block.module, kind, size, low, high, begins, ends))
    return rows


def kind_of(block: Block, *, saved: bool, ends_model: bool) -> str:
    """The kind of a block that is not static.

    Args:
        saved: a forward pass leaves it for its backward pass.
        ends_model: of a rank that computes the loss.
    """
    if block.kind:
        return block.kind
    if block.recomputed:
        return RECOMPUTED
    if block.module.startswith(OUTPUT[0]) or (block.module == "" and ends_model):
        return LOGITS
    if saved:
        return ACTIVATIONS
    return COMMUNICATION if block.received else WORKSPACE


def _interval(timeline: Timeline, chunk: int) -> tuple[int, int]:
    """From the forward pass of the oldest micro-batch in flight to the last backward pass of those."""
    worst = timeline.worst
    done = sum(m.turn.name == BACKWARD and m.turn.chunk == chunk for m in timeline.moments[:worst])
    turns = [index for index, m in enumerate(timeline.moments) if m.turn.name == FORWARD and m.turn.chunk == chunk]
    ends = [index for index, m in enumerate(timeline.moments) if m.turn.name == BACKWARD and m.turn.chunk == chunk]
    begun = sum(index <= worst for index in turns)
    return turns[min(done, len(turns) - 1)], ends[min(max(begun, 1) - 1, len(ends) - 1)]


def rounded_up(trace: RankTrace, timeline: Timeline, unit: int = 512) -> int:
    """Bytes that an allocator of so large units adds to the blocks alive at the worst moment."""
    static = {part.block for part in trace.static}
    alive = alive_at_worst(trace, timeline)
    sizes = [(trace.blocks[number].size, 1) for number in static]
    sizes += [(trace.blocks[number].size, copies) for number, copies in alive.items()]
    return sum(-size % unit * copies for size, copies in sizes)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their bytes alone become one."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row[:6], row.begins, row.ends), []).append(row)
    return [
        same[0]._replace(
            size=sum(row.size for row in same), low=sum(row.low for row in same), high=sum(row.high for row in same)
        )
        for same in found.values()
    ]
