"""A range for every micro-batch and for the larger modules, forward, backward and recomputed.

The forward pass is seen by hooks on modules. The backward pass is seen by the gradients: a module's begins when that of
its output is there, and ends when that of its input is, or when another module's begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_model_config
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.profile import names
from megatron_slm.profile.names import BACKWARD, FORWARD, RECOMPUTED, Label
from megatron_slm.profile.ranges import Ranges
from megatron_slm.train.optimizer_state import global_name

NAMED = frozenset(
    {
        "embedding",
        "input_layernorm",
        "self_attention",
        "core_attention",
        "pre_mlp_layernorm",
        "mlp",
        "router",
        "experts",
        "shared_experts",
        "final_layernorm",
        "output_layer",
    }
)
"""Last parts of the names of the modules that have ranges; whole layers have too."""


class _Backward(NamedTuple):
    name: str
    token: int


class ModuleRanges:
    """Listens from ``start`` to ``stop``; before and after it costs nothing."""

    def __init__(self, chunks: Sequence[nn.Module], ranges: Ranges) -> None:
        self._chunks, self._ranges = chunks, ranges
        self._handles: list[RemovableHandle] = []
        self._counts: Counter[int] = Counter()
        self._forward: list[int] = []
        self._backward: list[_Backward] = []
        self._in_backward = False
        self._early: list[str] = []
        self._reduces: Callable[..., Any] | None = None

    def start(self) -> None:
        """Listen."""
        for index, chunk in enumerate(self._chunks):
            number = index if len(self._chunks) > 1 else None
            self._handles.append(chunk.register_forward_pre_hook(partial(self._chunk_begins, index, number)))
            model = unwrap(chunk)
            for path, module in model.named_modules():
                if is_named(path):
                    name = global_name(model, path)
                    before, after = partial(self._begins, name), partial(self._ends, name)
                    self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(after, with_kwargs=True))
            self._handles.append(chunk.register_forward_hook(partial(self._chunk_ends, index, number)))
        config = get_model_config(self._chunks[0])
        self._reduces = config.finalize_model_grads_func
        config.finalize_model_grads_func = partial(self._reduced, config.finalize_model_grads_func)

    def stop(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            get_model_config(self._chunks[0]).finalize_model_grads_func = self._reduces
        self._handles = []
        self._forward, self._backward = [], []

    def begin_step(self) -> None:
        """Count micro-batches from 0 on."""
        self._counts.clear()
        self._forward, self._backward, self._early = [], [], []
        self._in_backward = False

    def _reduced(self, reduce: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        token = self._ranges.open(Label(names.PHASE, names.REDUCTION))
        try:
            return reduce(*arguments, **options)
        finally:
            self._ranges.close(token)

    def _chunk_begins(self, index: int, number: int | None, module: nn.Module, inputs: Any) -> None:
        self._forward.append(self._ranges.open(names.micro_batch(self._counts[index], FORWARD, number)))

    def _chunk_ends(self, index: int, number: int | None, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._forward:
            self._ranges.close(self._forward.pop())
        label = names.micro_batch(self._counts[index], BACKWARD, number)
        self._counts[index] += 1
        if (tensor := first_tensor(output)) is not None and tensor.grad_fn is not None:
            tensor.register_hook(partial(self._chunk_backward, label))

    def _chunk_backward(self, label: Label, gradient: Tensor) -> None:
        if not self._handles:
            return
        token = self._ranges.open(label, threads=True)
        self._backward, self._in_backward = [], True
        # Weights get their gradients last, so the end of the pass is the only end there is.
        Variable._execution_engine.queue_callback(partial(self._chunk_left, token))
        for name in self._early:
            self._backward_begins(name, gradient)
        self._early = []

    def _chunk_left(self, token: int) -> None:
        self._ranges.close(token)
        self._in_backward = False

    def _begins(self, name: str, module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        recomputed = in_backward()
        self._forward.append(self._ranges.open(names.module(name, RECOMPUTED if recomputed else FORWARD)))
        tensor = _input(inputs, options)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(partial(self._backward_ends, name))

    def _ends(self, name: str, module: nn.Module, inputs: Any, options: dict[str, Any], output: Any) -> None:
        if self._forward:
            self._ranges.close(self._forward.pop())
        tensor = first_tensor(output)
        if tensor is not None and tensor.grad_fn is not None and tensor is not _input(inputs, options):
            tensor.register_hook(partial(self._backward_begins, name))

    def _backward_begins(self, name: str, gradient: Tensor) -> None:
        if not self._handles:
            return
        if not self._in_backward:  # the module's output is the chunk's, and it has asked for the gradient first
            self._early.append(name)
            return
        while self._backward and not name.startswith(f"{self._backward[-1].name}."):
            self._ranges.close(self._backward.pop().token)
        self._backward.append(_Backward(name, self._ranges.open(names.module(name, BACKWARD), threads=True)))

    def _backward_ends(self, name: str, gradient: Tensor) -> None:
        if any(one.name == name for one in self._backward):
            while self._backward[-1].name != name:
                self._backward.pop()
            self._ranges.close(self._backward.pop().token)


def is_named(path: str) -> bool:
    """Whether a module has ranges, by its path in the chunk."""
    parts = path.split(".")
    if "experts" in parts[:-1]:
        return False
    return parts[-1] in NAMED or (len(parts) > 1 and parts[-1].isdigit() and parts[-2] == "layers")


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list):
        return next((found for part in output if (found := first_tensor(part)) is not None), None)
    return None


def _input(inputs: Any, options: dict[str, Any]) -> Tensor | None:
    """What a module works on, which core hands over by place or as ``hidden_states``; never a weight."""
    tensor = first_tensor((*inputs, options.get("hidden_states")))
    return None if isinstance(tensor, nn.Parameter) else tensor


def in_backward() -> bool:
    """Whether autograd is running: a forward pass then is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)
