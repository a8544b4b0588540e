"""What the modules of one rank put out, and the gradient of it, micro-batch by micro-batch.

Only what a reader would name is watched, and only where the rank's part of the global tensor is known: experts see
tokens in an order of their own, so a mixture is watched at its router and where it ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.optimizer_state import global_name

NAMED = frozenset(
    {
        "embedding",
        "input_layernorm",
        "linear_qkv",
        "linear_q_proj",
        "linear_q_down_proj",
        "linear_q_up_proj",
        "linear_kv_down_proj",
        "linear_kv_up_proj",
        "q_layernorm",
        "k_layernorm",
        "kv_layernorm",
        "core_attention",
        "linear_proj",
        "pre_mlp_layernorm",
        "router",
        "shared_experts",
        "linear_fc1",
        "linear_fc2",
        "mlp",
        "enorm",
        "hnorm",
        "eh_proj",
        "final_layernorm",
        "output_layer",
    }
)
"""Last parts of the names of watched modules; layers are watched too."""

FORWARD, BACKWARD = "forward", "backward"


class Place(NamedTuple):
    """Where a rank stands: coordinates and degrees."""

    tp: int
    tp_size: int
    cp: int
    cp_size: int
    dp: int
    dp_size: int
    pp: int
    pp_size: int

    @staticmethod
    def of(groups: Any) -> Place:
        """This rank's place in its groups."""
        pairs = [(group.rank(), group.size()) for group in (groups.tp, groups.cp, groups.dp, groups.pp)]
        return Place(*(number for pair in pairs for number in pair))


class Watched(NamedTuple):
    """A module's output (or its gradient) of one of this rank's micro-batches, in the order they came.

    Attributes:
        direction: ``FORWARD`` or ``BACKWARD``.
        micro_batch: counted on this data-parallel rank.
        values: local, as the module puts it out.
    """

    name: str
    direction: str
    micro_batch: int
    values: Tensor


class Watch:
    """Hooks on the modules of a rank's chunks, until ``stop``."""

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self._found: list[Watched] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._handles = [
            module.register_forward_hook(self._hook(global_name(model, name)))
            for model in map(unwrap, chunks)
            for name, module in model.named_modules()
            if is_named(name)
        ]

    def stop(self, *, reverse: bool = False) -> list[Watched]:
        """Take the hooks off; what was seen. With ``reverse`` the micro-batches came from the last to the first."""
        for handle in self._handles:
            handle.remove()
        if not reverse:
            return self._found
        return [
            one._replace(micro_batch=self._seen[one.name, one.direction] - 1 - one.micro_batch) for one in self._found
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None:
                return
            if not in_backward():  # there a recomputed forward pass repeats what was seen
                self._keep(name, FORWARD, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._keep(name, BACKWARD, gradient))

        return after_forward

    def _keep(self, name: str, direction: str, tensor: Tensor) -> None:
        self._found.append(Watched(name, direction, self._seen[name, direction], tensor.detach().clone()))
        self._seen[name, direction] += 1


def is_named(name: str) -> bool:
    """Whether a module is watched, by its name in the chunk."""
    parts = name.split(".")
    if "experts" in parts[:-1]:
        return False
    return parts[-1] in NAMED or (len(parts) > 1 and parts[-1].isdigit() and parts[-2] == "layers")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of numbers that a module's output is or begins with."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, tuple | list):
        return next((found for part in output if (found := first_tensor(part)) is not None), None)
    return None


def in_backward() -> bool:
    """Whether autograd is running: what a recomputing layer calls then is its forward pass once more."""
    return bool(torch._C._current_graph_task_id() != -1)
