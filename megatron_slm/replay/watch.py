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
from torch.utils.hooks import RemovableHandle

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
        self._recomputed: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        for model in map(unwrap, chunks):
            passes = Passes(embeds=bool(getattr(model, "pre_process", True)))
            self._handles.append(model.register_forward_pre_hook(passes.begin))
            for name, module in model.named_modules():
                if is_named(name):
                    self._handles.append(module.register_forward_hook(self._hook(global_name(model, name), passes)))

    def stop(self, *, reverse: bool = False) -> list[Watched]:
        """Take the hooks off; what was seen. With ``reverse`` the micro-batches came from the last to the first."""
        for handle in self._handles:
            handle.remove()
        if not reverse:
            return self._found
        last = max((one.micro_batch for one in self._found), default=0)
        return [one._replace(micro_batch=last - one.micro_batch) for one in self._found]

    def _hook(self, name: str, passes: Passes) -> Callable[..., None]:
        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None:
                return
            if in_backward():  # a recomputed forward pass repeats what was seen, and only it has a gradient
                told, micro_batch = name, self._recomputed[name]
                self._recomputed[name] += 1
            else:
                told, micro_batch = passes.called(name), passes.number
                self._keep(told, FORWARD, micro_batch, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._keep(told, BACKWARD, micro_batch, gradient))

        return after_forward

    def _keep(self, name: str, direction: str, micro_batch: int, tensor: Tensor) -> None:
        self._found.append(Watched(name, direction, micro_batch, tensor.detach().clone()))


class Passes:
    """Forward passes of a chunk, one a micro-batch, and what multi-token prediction calls in them once more."""

    def __init__(self, *, embeds: bool) -> None:
        """``embeds``: the chunk begins the model, so the first call of its embedding is the model's own."""
        self.number = -1
        self._embeds = embeds
        self._calls: Counter[str] = Counter()

    def begin(self, *_: Any) -> None:
        """The next micro-batch."""
        self.number += 1
        self._calls.clear()

    def called(self, name: str) -> str:
        """The name of one more call of a module: ``embedding``, then ``mtp.embedding``, ``mtp.embedding[2]``."""
        call = self._calls[name] + (name == "embedding" and not self._embeds)
        self._calls[name] += 1
        return name if call == 0 else f"mtp.{name}" if call == 1 else f"mtp.{name}[{call}]"


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
