"""Hooks on a rank's modules: what each puts out in every micro-batch, and the gradient of it, when it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.replay.page import Page
from megatron_slm.replay.stream import Phase
from megatron_slm.train.optimizer_state import global_name

NAMED = frozenset({"embedding", "self_attention", "router", "mlp", "final_layernorm"})
"""Last parts of the names of the modules that are listened to; whole layers are too."""


class Listener:
    """Listens from ``start`` to ``stop``; between ``stop`` and the next ``start`` it costs nothing."""

    def __init__(self, chunks: Sequence[nn.Module], page: Page, *, layers: bool) -> None:
        """``layers``: not the loss alone but the modules inside."""
        self._page = page
        self._modules: list[tuple[str, nn.Module, Phase]] = []
        self._sending: list[nn.Module] = []
        for model in map(unwrap, chunks):
            if layers:
                named = [(name, module) for name, module in model.named_modules() if is_named(name)]
                self._modules += [(global_name(model, name), module, Phase.OUTPUT) for name, module in named]
            if model.post_process:
                self._modules.append(("loss", model, Phase.LOSS))
            else:
                self._sending.append(model)
        self._handles: list[RemovableHandle] = []
        self._calls: Counter[str] = Counter()
        self._recomputed: Counter[str] = Counter()

    def start(self) -> None:
        """Count the micro-batches of a step from 0 on."""
        self.stop()
        self._calls.clear()
        self._recomputed.clear()
        for name, module, phase in self._modules:
            self._handles.append(module.register_forward_hook(partial(self._after_forward, name, phase)))
        for model in self._sending:
            # Core empties what a chunk has put out as soon as it is sent to the next pipeline stage.
            self._handles.append(model.register_forward_hook(lambda *_: self._page.note_now()))

    def stop(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_forward(self, name: str, phase: Phase, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = tensors_in(output)
        names = [name, *(f"{name}[{index}]" for index in range(1, len(tensors)))]
        if in_backward():
            # A recomputed pass repeats what was noted, and only it has a gradient. Micro-batches come in one order.
            micro_batch = self._recomputed[name]
            self._recomputed[name] += 1
        else:
            micro_batch = self._calls[name]
            self._calls[name] += 1
            self._page.note_soon(phase, micro_batch, names, tensors)
        if phase is Phase.OUTPUT:
            for part, tensor in zip(names, tensors, strict=True):
                # A leaf is a parameter, as core's bias that is added later: a hook on it would stay for good.
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(self._after_backward, part, micro_batch))

    def _after_backward(self, name: str, micro_batch: int, gradient: Tensor) -> None:
        if self._handles:
            self._page.note_soon(Phase.OUTPUT_GRADIENT, micro_batch, [name], [gradient])


def is_named(name: str) -> bool:
    """Whether a module is listened to, by its name in the chunk."""
    parts = name.split(".")
    if "experts" in parts[:-1]:
        return False
    return parts[-1] in NAMED or (len(parts) > 1 and parts[-1].isdigit() and parts[-2] == "layers")


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of a module's output, in their order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors_in(part)]
    return []


def in_backward() -> bool:
    """Whether autograd is running: what a recomputing layer calls then is its forward pass once more."""
    return bool(torch._C._current_graph_task_id() != -1)
