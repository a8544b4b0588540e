"""What a rank allocates, in the order in which it does: the life of every storage, and every op that is run.

A :class:`Recorder` is a dispatch mode: below autograd it sees each op once, in the forward pass, in the backward pass
and in a recomputation. It works on real tensors and on those of the dry world alike. Sizes are bytes as asked for.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_slm.parallel.device import storage_resizes

NOWHERE = ""
"""Outside of every module: the loss, buffers of the schedule, the optimizer."""
COMMUNICATION = "communication buffers"
"""Kind of a block that another rank's data is put into, or that is sent."""
COPIES = "weight copies"
"""Kind of what is kept of a weight in another format."""
KINDS = {"declared.weight_copy": COPIES}
"""Op -> kind of what it makes, where it makes nothing else."""


@dataclass(slots=True)
class Block:
    """One storage.

    Attributes:
        size: bytes.
        module: global name of the module that was running when it was made; in a backward pass, of the module whose
            gradient was.
        op: the op that made it.
        recomputed: made by a forward pass inside of a backward pass.
        received: other ranks' data was put into it.
        kind: what it is, where the module that made it has said so ("weight copies").
    """

    size: int
    module: str
    op: str
    recomputed: bool = False
    received: bool = False
    kind: str = ""


class Op(NamedTuple):
    """One op that takes time.

    Attributes:
        kind: "gemm" (matrix products, attention among them), "memory" (all other kernels), "communication".
        name: of the op, as torch names it.
        module: as in :class:`Block`.
        flops: multiply-adds count two; of a gemm.
        moved_bytes: that it reads and writes.
        group: name of the process group it communicates over; empty otherwise.
        shapes: of its tensors.
    """

    kind: str
    name: str
    module: str
    flops: float
    moved_bytes: int
    group: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Phase:
    """Part of a step: what it allocates and releases, in order.

    Attributes:
        events: ``i`` for block ``i`` made, ``~i`` for it released.
        ops: what was run.
        output: block that it leaves to the schedule: what is sent to another pipeline rank.
        packed: blocks that autograd was given for the backward pass, where ``Recorder.saving`` was asked.
    """

    events: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    output: int | None = None
    packed: set[int] = field(default_factory=set)


TemporaryBytes = Callable[[str, Sequence[Any]], int]
"""Name and arguments of a collective -> bytes."""


class Recorder(TorchDispatchMode):
    """Follows everything that happens inside of it. Modules are named by ``names``, given once they exist.

    Attributes:
        blocks: every storage seen, by number.
        phase: what is written to now; set it to begin another.
    """

    def __init__(self, temporary_bytes: TemporaryBytes | None = None, *, notes_saved: bool = False) -> None:
        """Begin with nothing.

        Args:
            temporary_bytes: what a collective's backend allocates for itself while it runs.
            notes_saved: ``saving`` notes what autograd saves.
        """
        super().__init__()
        self._notes_saved = notes_saved
        self._temporary_bytes = temporary_bytes
        self.blocks: list[Block] = []
        self.phase = Phase()
        self.names: dict[nn.Module, str] = {}
        self._alive: dict[int, int] = {}
        self._seen: set[int] = set()
        self._stack: list[str] = []
        self._sequence: list[int] = []
        self._modules: list[str] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        for register, hook in (
            (nn.modules.module.register_module_forward_pre_hook, self._entered),
            (nn.modules.module.register_module_forward_hook, self._left),
        ):
            self._hooks.callback(register(hook).remove)
        self._hooks.enter_context(storage_resizes(self._resized))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One op."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # questions about a tensor
            return out
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        module, name = self.module(), str(func._overloadpacket)
        for tensor in made:
            self._see(tensor, module, name)
        if func.namespace == "c10d":
            self._exchanged(name, args)
        if (op := costed(func, name, module, args, kwargs, out)) is not None:
            self.phase.ops.append(op)
        return out

    def module(self) -> str:
        """Name of the module that runs now, or whose backward pass does."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None or not self._sequence:
            return NOWHERE
        at = bisect.bisect_right(self._sequence, node._sequence_nr()) - 1
        return self._modules[at] if at >= 0 else NOWHERE

    def number(self, tensor: Tensor) -> int | None:
        """The block that holds a tensor's elements; None where it was made outside."""
        return self._alive.get(tensor.untyped_storage()._cdata)

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Follow storages that exist already; they are no events until they are released."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage.nbytes():
                self._seen.add(storage._cdata)
                self._alive[storage._cdata] = len(self.blocks)
                self.blocks.append(Block(storage.nbytes(), NOWHERE, "found"))
                weakref.finalize(storage, self._release, storage._cdata)

    def saving(self) -> AbstractContextManager[Any]:
        """Note in ``phase`` what autograd saves meanwhile, where that is wanted."""
        if not self._notes_saved:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if (number := self.number(tensor)) is not None:
            self.phase.packed.add(number)
        return tensor

    def alive(self) -> set[int]:
        """Numbers of all blocks that exist now."""
        return set(self._alive.values())

    def _see(self, tensor: Tensor, module: str, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self._begin(storage, module, op)
        weakref.finalize(storage, self._release, key)

    def _begin(self, storage: torch.UntypedStorage, module: str, op: str) -> None:
        number = len(self.blocks)
        recomputed = bool(self._stack) and torch._C._current_autograd_node() is not None
        self.blocks.append(Block(storage.nbytes(), module, op, recomputed, kind=KINDS.get(op, "")))
        self._alive[storage._cdata] = number
        self.phase.events.append(number)

    def _exchanged(self, name: str, args: Sequence[Any]) -> None:
        for tensor in tree_leaves(args[0]) if name in RECEIVING else ():
            if isinstance(tensor, Tensor) and (number := self.number(tensor)) is not None:
                self.blocks[number].received = True
        size = self._temporary_bytes(name, args) if self._temporary_bytes is not None else 0
        if size:
            self.phase.events += [len(self.blocks), ~len(self.blocks)]
            self.blocks.append(Block(size, self.module(), name, received=True, kind=COMMUNICATION))

    def _release(self, key: int) -> None:
        self._seen.discard(key)
        if (number := self._alive.pop(key, None)) is not None:
            self.phase.events.append(~number)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Its bytes were given back, or taken again by what was recomputed."""
        key = storage._cdata
        if key in self._seen:
            if (number := self._alive.pop(key, None)) is not None:
                self.phase.events.append(~number)
            if storage.nbytes():
                self._begin(storage, self.module(), "resize_")

    def _entered(self, module: nn.Module, inputs: Any) -> None:
        name = self.names.get(module)
        self._stack.append(name if name is not None else self._stack[-1] if self._stack else NOWHERE)
        self._mark()

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        """From now on autograd's nodes belong to the module on top."""
        self._sequence.append(torch.autograd._get_sequence_nr())
        self._modules.append(self._stack[-1] if self._stack else NOWHERE)


RECEIVING = frozenset(
    {"c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.alltoall_base_", "c10d.recv_", "c10d.alltoall_"}
)
"""Collectives whose first argument is what is received; an all-reduce works in place."""

FREE = frozenset(
    {"aten.view", "aten.t", "aten.transpose", "aten.detach", "aten.alias", "aten.slice", "aten.select", "aten.expand"}
    | {"aten.permute", "aten.as_strided", "aten.split", "aten.unsqueeze", "aten.squeeze", "aten._unsafe_view"}
    | {"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.chunk", "aten.unbind"}
    | {"aten._local_scalar_dense", "aten.split_with_sizes", "aten.lift_fresh", "aten.reshape"}
)
"""Ops without a kernel."""


def costed(func: Any, name: str, module: str, args: Any, kwargs: Any, out: Any) -> Op | None:
    """The op as something that takes time; None where no kernel is run."""
    if name in FREE:
        return None
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    if func.namespace == "c10d":
        return Op("communication", name, module, 0.0, _sent(func, args), _group_name(args), shapes)
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *made])
    counted: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    flops = float(counted(*args, **kwargs, out_val=out)) if counted is not None else 0.0
    return Op("gemm" if flops else "memory", name, module, flops, moved, "", shapes)


def _sent(func: Any, args: Any) -> int:
    """Bytes of the largest side of an exchange: the whole of a gather or a scatter, the message of a send."""
    sides = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor)] for side in args]
    return max((sum(t.numel() * t.element_size() for t in side) for side in sides), default=0)


def _group_name(args: Any) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return str(torch._C._distributed_c10d.ProcessGroup.unbox(argument).group_name)
    return ""
