"""Every operation that a step dispatches, with what it puts out: the finest level of a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PASSED_OVER = frozenset({"c10d", "_c10d_functional", "profiler", "prim"})
"""Namespaces whose results are not values yet, or none: an exchange is still on its way when its call returns."""
UNWRITTEN = frozenset({"aten::empty", "aten::empty_like", "aten::empty_permuted", "aten::empty_strided",
                       "aten::new_empty", "aten::new_empty_strided", "aten::resize_"})  # fmt: skip
"""What these put out is whatever the memory held before."""


class Operations(TorchDispatchMode):
    """While entered, hands every operation's outputs to ``note``, in the order of their calls.

    An operation that gives a view, or memory that nobody has written to, has computed nothing and is passed over.
    """

    def __init__(self, note: Callable[[str, list[Tensor]], None]) -> None:
        """``note`` takes the operation's name, as in ``aten.mm.default``, and its outputs."""
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then note what it gave."""
        output = function(*args, **(kwargs or {}))
        if function.namespace not in PASSED_OVER and not function.is_view and function._schema.name not in UNWRITTEN:
            tensors = [
                leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.layout is torch.strided
            ]
            if tensors:
                self._note(str(function), tensors)
        return output
