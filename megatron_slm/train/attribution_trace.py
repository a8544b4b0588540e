"""Watches every module and every node of the autograd graph while a step runs, and keeps what is not finite first.

A module is watched through what it puts out. In the backward pass modules are too coarse: a gradient that several
consumers have added up says nothing of any one of them. So the nodes of the graph are watched one by one, each under
the name of the innermost module whose forward pass made it. What comes first in the order of execution is the origin,
as far as one rank can tell; ranks are compared by ``Event.order``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.attribution_event import (
    ACCUMULATION,
    PASS,
    REDUCTION,
    Event,
    count_nonfinite,
    tensors_in,
)
from megatron_slm.train.attribution_state import bad_gradients, stage_of
from megatron_slm.train.optimizer_state import global_name, named_parameters

FORWARD, BACKWARD = range(2)
RECEIVED = 0
"""Comes before the first module (1) of a pass."""


class Trace:
    """The first values of every pass that are not finite.

    Args:
        chunks: wrapped model chunks of this rank.
        groups: process groups.
    """

    def __init__(self, chunks: Sequence[Any], groups: Any) -> None:
        self._chunks, self._groups = chunks, groups
        self._parameters = {param: name for name, param in named_parameters(list(chunks))}
        self._started = [0] * len(chunks)
        self._labelled: set[Any] = set()
        self._pass: tuple[int, int, int] = (0, FORWARD, 0)
        self._sequence = 0
        self._found: dict[tuple[int, int, int], Event] = {}
        self._after: list[Event] = []
        self._places: dict[str, tuple[int, int]] = {}

    def first(self) -> Event | None:
        """The event of this rank that comes first in causal order."""
        return min([*self._found.values(), *self._after], key=lambda event: event.order, default=None)

    def nearest_the_loss(self, gradients: Sequence[Event]) -> Event | None:
        """Of bad gradients the one that was made first: a backward pass spreads it to everything after it."""
        placed = []
        for event in gradients:
            stage, sequence = self._places.get(event.module, (0, 0))
            placed.append(replace(event, order=(*event.order, -stage, -sequence)))
        return min(placed, key=lambda event: event.order, default=None)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside; the model is left as it was."""
        handles = []
        for index, chunk in enumerate(self._chunks):
            handles.append(chunk.register_forward_pre_hook(partial(self._begin_forward, index)))
            for name, module in unwrap(chunk).named_modules():
                hook = partial(self._after_module, global_name(unwrap(chunk), name) or "model")
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            handles.append(chunk.register_forward_hook(partial(self._end_forward, index), with_kwargs=True))
        config = get_model_config(self._chunks[0])
        finalize = config.finalize_model_grads_func

        def reduce(*args: Any, **kwargs: Any) -> Any:
            # An overlapped reduction is under way by now: the buffers are nobody's to read.
            if not any(chunk.ddp_config.overlap_grad_reduce for chunk in self._chunks):
                self._look_at_buffers(ACCUMULATION, "backward", "gradient added up over the micro-batches")
            return finalize(*args, **kwargs)

        config.finalize_model_grads_func = reduce
        try:
            yield
            self._look_at_buffers(REDUCTION, "reduction", "gradient")
        finally:
            config.finalize_model_grads_func = finalize
            for handle in handles:
                handle.remove()
            self._labelled.clear()

    def _begin_forward(self, index: int, chunk: nn.Module, args: Any) -> None:
        self._pass = (self._started[index], FORWARD, index)
        self._started[index] += 1
        self._sequence = RECEIVED
        self._labelled.clear()
        model = unwrap(chunk)
        if not model.pre_process:
            self._look(model.decoder.input_tensor, "decoder", "input, received from the pipeline stage before it,")

    def _after_module(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._sequence += 1
        self._places.setdefault(name, (stage_of(self._pass[2], self._groups), self._sequence))
        self._look(output, name, "output")
        self._label(name, (args, kwargs), output)

    def _end_forward(self, index: int, chunk: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._label("model", (args, kwargs), output)
        micro_batch = self._pass[0]
        # The gradient of the chunk's output is where its backward pass begins.
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._begin_backward, micro_batch, index))

    def _begin_backward(self, micro_batch: int, index: int, gradient: Tensor) -> None:
        self._pass = (micro_batch, BACKWARD, index)
        self._sequence = RECEIVED
        sender = "the loss" if unwrap(self._chunks[index]).post_process else "the pipeline stage behind it"
        self._look(gradient, "model", f"gradient of the output, received from {sender},")

    def _label(self, name: str, inputs: Any, output: Any) -> None:
        """Watch the nodes between a module's inputs and its output that no module inside it has taken."""
        before = {node for tensor in tensors_in(inputs) for node in _made_by(tensor)}
        waiting = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
        seen = set(before)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            behind = [following for following, _ in node.next_functions]
            waiting += [following for following in behind if following is not None]
            if node not in self._labelled and not hasattr(node, "variable"):
                self._labelled.add(node)
                leaves = [getattr(following, "variable", None) for following in behind]
                node.register_hook(partial(self._after_node, name, leaves))

    def _after_node(self, name: str, leaves: list[Any], made: Sequence[Any], received: Sequence[Any]) -> None:
        """A node has turned the gradients ``received`` into those ``made`` for its inputs (``leaves``: parameters)."""
        self._sequence += 1
        if self._pass in self._found:
            return
        self._look(received, name, "gradient of the output")
        for gradient, leaf in zip(made, leaves, strict=False):
            parameter = self._parameters.get(leaf) if leaf is not None else None
            if parameter is None:
                self._look(gradient, name, "gradient of the input")
            elif not getattr(leaf, "grad_added_to_main_grad", False):  # else what autograd sees is not the gradient
                module, _, kind = parameter.rpartition(".")
                self._look(gradient, module, f"gradient of the {kind}")

    def _look(self, value: Any, name: str, tensor: str) -> None:
        """Keep the first tensor of the pass that has values which are not finite."""
        if self._pass in self._found:
            return
        for part in tensors_in(value):
            nonfinite = count_nonfinite(part)
            if nonfinite:
                self._found[self._pass] = Event(
                    order=self._order(),
                    phase="backward" if self._pass[1] == BACKWARD else "forward",
                    module=name,
                    tensor=tensor,
                    nonfinite=nonfinite,
                    total=part.numel(),
                    micro_batch=self._pass[0],
                )
                return

    def _order(self) -> tuple[int, ...]:
        """Micro-batch; forward before backward; pipeline stages in their order, backwards in the backward pass."""
        micro_batch, direction, index = self._pass
        stage = stage_of(index, self._groups)
        return PASS, micro_batch, direction, -stage if direction == BACKWARD else stage, self._sequence

    def _look_at_buffers(self, number: int, phase: str, word: str) -> None:
        nearest = self.nearest_the_loss(bad_gradients(self._chunks, number, phase, word))
        self._after += [nearest] if nearest is not None else []


def _made_by(tensor: Tensor) -> Iterator[Any]:
    """The node behind a module's input; what torch's full backward hooks put before it belongs to the module."""
    node = tensor.grad_fn
    while node is not None and type(node).__name__ == "BackwardHookFunctionBackward":
        node = node.next_functions[0][0]
    if node is not None:
        yield node
