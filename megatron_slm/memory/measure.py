"""What a step of a real run allocates, in the rows of the ledger. Everything here is measured.

On CPU ranks a :class:`StepRecorder` follows every storage through one step. On a GPU kernels allocate what no op shows:
there, what is held between steps and what autograd saves are measured by their storages, and the rest is what torch's
allocator says beyond them.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megatron_slm.memory.gloo import gloo_temporary_bytes
from megatron_slm.memory.ledger import Row, kind_of, merged
from megatron_slm.memory.rank import module_names
from megatron_slm.memory.static import WORKSPACE, StaticPart, static_parts
from megatron_slm.memory.trace import COMMUNICATION, NOWHERE, Recorder
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.layer_norms import part_of

BETWEEN_STAGES = ("c10d.send", "c10d.recv_")
"""What the schedule sends and receives is its own, as in the ledger: it holds it, whichever module has made it."""
EVERYTHING_ELSE = "everything else"
"""Kind of what torch's allocator counts on a GPU beyond what is held between steps."""

Saved = dict[tuple[int, str], int]
"""(chunk, layer) -> bytes that one micro-batch's forward pass leaves for its backward pass."""


@dataclass(frozen=True)
class Measurement:
    """One step of one rank.

    Attributes:
        rows: at the worst moment; they add up to ``peak_bytes``.
        saved: of the first micro-batch through each chunk.
        peak_bytes: the most that was allocated at once.
        reserved_bytes: the most that torch's allocator had taken from the device; None on a CPU.
        static_bytes: what exists between steps.
    """

    rank: int
    pipeline_rank: int
    rows: list[Row]
    saved: Saved
    peak_bytes: int
    static_bytes: int
    reserved_bytes: int | None = None


@dataclass
class _Pass:
    """A forward pass, or what follows until the next one."""

    chunk: int
    begins: int
    is_forward: bool
    packed: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)


class StepRecorder(Recorder):
    """Follows one step of a run whose model exists already: enter it before the step, leave it afterwards."""

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        super().__init__(gloo_temporary_bytes, notes_saved=True)
        self.names: dict[nn.Module, str] = module_names(chunks)
        self._roots = {unwrap(chunk): index for index, chunk in enumerate(chunks)}
        self.adopt(existing_tensors(next(chunks[0].parameters()).device.type))
        self.static = static_parts(chunks, optimizer, self)
        self._static_blocks = {part.block for part in self.static}
        self._passes = [_Pass(0, 0, is_forward=False)]
        self._saving = self.saving()

    def __enter__(self) -> StepRecorder:
        super().__enter__()
        self._saving.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._saving.__exit__(*details)
        super().__exit__(*details)
        self._end_pass()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One op."""
        if self._passes[-1].is_forward and torch._C._current_autograd_node() is not None:
            self._begin_pass(self._passes[-1].chunk, is_forward=False)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def saved(self) -> Saved:
        """What autograd holds at the end of the first forward pass of each chunk, by the layers that made it."""
        found: Saved = {}
        for one in reversed([one for one in self._passes if one.is_forward]):
            sizes: Counter[str] = Counter()
            for number in one.packed:
                sizes[part_of(self.blocks[number].module)] += self.blocks[number].size
            found = {key: size for key, size in found.items() if key[0] != one.chunk}
            found |= {(one.chunk, layer): size for layer, size in sizes.items()}
        return found

    def measurement(self, rank: int, pipeline_rank: int, *, ends_model: bool) -> Measurement:
        """What was followed.

        Args:
            ends_model: this rank computes the loss.
        """
        alive, peak = self._worst()
        passes = {number: one.chunk for one in self._passes for number in one.saved}
        static = sum(part.size for part in self.static)
        rows = static_rows(self.static, rank, pipeline_rank)
        lost = self._static_blocks - alive  # found before the step, and released in it
        rows = [row for row, part in zip(rows, self.static, strict=True) if part.block not in lost]
        for number in alive - self._static_blocks:
            block = self.blocks[number]
            kind = kind_of(block, saved=number in passes, ends_model=ends_model)
            rows.append(_row(rank, pipeline_rank, passes.get(number, 0), block.module, kind, block.size))
        return Measurement(rank, pipeline_rank, merged(rows), self.saved(), peak, static)

    def _worst(self) -> tuple[set[int], int]:
        """Blocks alive at the worst moment, and their bytes."""
        alive = set(self._static_blocks)
        current = peak = sum(self.blocks[number].size for number in alive)
        worst, position = set(alive), 0
        sizes = [self.blocks[event].size if event >= 0 else -self.blocks[~event].size for event in self.phase.events]
        for index, size in enumerate(sizes, start=1):
            current += size
            if current > peak:
                peak, position = current, index
        for event in self.phase.events[:position]:
            worst.symmetric_difference_update((event if event >= 0 else ~event,))
        return worst, peak

    def _entered(self, module: nn.Module, inputs: Any) -> None:
        if module in self._roots and torch._C._current_autograd_node() is None:
            self._begin_pass(self._roots[module], is_forward=True)
        super()._entered(module, inputs)

    def _exchanged(self, name: str, args: Sequence[Any]) -> None:
        super()._exchanged(name, args)
        if name in BETWEEN_STAGES:
            for tensor in tree_leaves(args[0]):
                block = self.blocks[self._alive[tensor.untyped_storage()._cdata]]
                block.kind, block.module = COMMUNICATION, NOWHERE

    def _begin_pass(self, chunk: int, *, is_forward: bool) -> None:
        self._end_pass()
        self._passes.append(_Pass(chunk, len(self.blocks), is_forward))

    def _end_pass(self) -> None:
        """What is left of a forward pass is what it has saved."""
        last = self._passes[-1]
        if last.is_forward and not last.saved:
            alive = self.alive()
            last.packed &= alive
            last.saved = {number for number in alive if number >= last.begins}

    def _pack(self, tensor: Tensor) -> Tensor:
        number = self.number(tensor)
        if number is not None and number not in self._static_blocks and self._passes[-1].is_forward:
            self._passes[-1].packed.add(number)
        return tensor


def static_rows(static: Iterable[StaticPart], rank: int, pipeline_rank: int) -> list[Row]:
    """A row for every part."""
    return [_row(rank, pipeline_rank, part.chunk, part.module, part.kind, part.size) for part in static]


def _row(rank: int, pipeline_rank: int, chunk: int, module: str, kind: str, size: int) -> Row:
    layer = part_of(module) if module else ""
    return Row(rank, pipeline_rank, chunk, layer, module, kind, size, size, size, 0, 0)


def existing_tensors(device: str) -> list[Tensor]:
    """Every tensor of a device that Python knows."""
    was_frozen = gc.get_freeze_count() > 0  # the loop freezes what outlives a step, and ``get_objects`` leaves it out
    gc.unfreeze()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    if was_frozen:
        gc.freeze()
    return [tensor for tensor in found if tensor.device.type == device and tensor.layout == torch.strided]


def allocator_measurement(chunks: list[Any], optimizer: Any, *, rank: int, pipeline_rank: int) -> Measurement:
    """On a GPU: what exists between steps by its storages, and the rest as torch's allocator counts it.

    The peak is the most since the run began: a step's, unless something else needed more.
    """
    storages = Recorder()
    storages.adopt(existing_tensors("cuda"))
    parts = static_parts(chunks, optimizer, storages)
    static = [part for part in parts if part.kind != WORKSPACE]
    statistics = torch.cuda.memory_stats()
    peak = int(statistics["allocated_bytes.all.peak"])
    held = sum(part.size for part in static)
    rows = [*static_rows(static, rank, pipeline_rank)]
    rows.append(_row(rank, pipeline_rank, 0, "", EVERYTHING_ELSE, peak - held))
    reserved = int(statistics["reserved_bytes.all.peak"])
    return Measurement(rank, pipeline_rank, merged(rows), {}, peak, held, reserved)
