"""Every operation that a step dispatches, with what it puts out and where it was called: the finest level.

A backward operation is called by autograd's engine, from no line of Python. Nodes of the graph are numbered as they are
made, so the line that made a node is found again when the node runs.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_slm.replay import places
from megatron_slm.replay.places import Place

PASSED_OVER = frozenset({"c10d", "_c10d_functional", "profiler", "prim"})
"""Namespaces whose results are not values yet, or none: an exchange is still on its way when its call returns."""
UNWRITTEN = frozenset({"aten::empty", "aten::empty_like", "aten::empty_permuted", "aten::empty_strided",
                       "aten::new_empty", "aten::new_empty_strided", "aten::resize_"})  # fmt: skip
"""What these put out is whatever the memory held before."""
TORCH = str(Path(torch.__file__).parent) + os.sep
ENGINE = "_engine_run_backward"
"""The function of torch that calls autograd's engine."""
NOWHERE = Place("autograd", 0, "backward", "")


class Operations(TorchDispatchMode):
    """While entered, hands every operation's outputs to ``note``, in the order of their calls; then writes the places.

    An operation that gives a view, or memory that nobody has written to, has computed nothing and is passed over.
    """

    def __init__(self, note: Callable[[str, list[Tensor]], bool], file: Path) -> None:
        """Note nothing yet.

        Args:
            note: takes the operation's name, as in ``aten.mm.default``, and its outputs; whether they were recorded.
            file: where the places of the records go.
        """
        super().__init__()
        self._note, self._file = note, file
        self._source = _Source()
        self._table: dict[Place, int] = {}
        self._numbers: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then note what it gave."""
        place = self._source.place(sys._getframe(1))
        output = function(*args, **(kwargs or {}))
        if function.namespace not in PASSED_OVER and not function.is_view and function._schema.name not in UNWRITTEN:
            tensors = [
                leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.layout is torch.strided
            ]
            if tensors and self._note(str(function), tensors):
                self._numbers += [self._table.setdefault(place, len(self._table))] * len(tensors)
        return output

    def __exit__(self, *error: Any) -> None:
        """Write the places."""
        super().__exit__(*error)
        places.write(self._file, list(self._table), self._numbers)


class _Source:
    """Finds the line of source that calls an operation, or that made the node of the graph that does."""

    def __init__(self) -> None:
        self._made: dict[int, Place] = {}
        self._known: dict[tuple[CodeType, int], Place] = {}
        own = Path(__file__).parents[2]
        # The longest first: an environment may lie inside of the checkout.
        roots = {str(own), *(os.path.realpath(entry) for entry in sys.path if entry)}
        self._roots = sorted((root.rstrip(os.sep) + os.sep for root in roots), key=len, reverse=True)

    def place(self, frame: FrameType | None) -> Place:
        """Where the operation was called; of ``frame`` and its callers the innermost that is not torch's own."""
        while frame is not None and _is_torch(frame.f_code):
            if frame.f_code.co_name == ENGINE:
                frame = None
                break
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        if frame is None:
            made = self._made.get(node._sequence_nr()) if node is not None else None
            return made._replace(backward=True) if made is not None else NOWHERE
        place = self._at(frame)
        if torch.is_grad_enabled():
            # The node of this operation, where it has one, was made just before. One that has none leaves it as it is.
            self._made.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
        return place

    def _at(self, frame: FrameType) -> Place:
        key = frame.f_code, frame.f_lineno
        found = self._known.get(key)
        if found is None:
            file = frame.f_code.co_filename
            text = linecache.getline(file, frame.f_lineno).strip()
            found = self._known[key] = Place(self._shown(file), frame.f_lineno, frame.f_code.co_name, text)
        return found

    def _shown(self, file: str) -> str:
        real = os.path.realpath(file)
        return next((real.removeprefix(root) for root in self._roots if real.startswith(root)), real)


def _is_torch(code: CodeType) -> bool:
    """Whether a function is torch's own, or one of generated source that lies in no file."""
    return code.co_filename.startswith((TORCH, "<"))
