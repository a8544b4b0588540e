"""What a rank holds between steps, parameter by parameter: weights, gradients, master weights, moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from megatron_slm.memory.trace import Recorder
from megatron_slm.train.optimizer_state import inner_optimizers, masters_of, named_parameters

PARAMETERS, GRADIENTS, MASTERS, MOMENTS, WORKSPACE = (
    "parameters",
    "gradients",
    "master weights",
    "moments",
    "workspace",
)
PADDING = "padding"
OTHER_MODELS = "other models"
"""Critic, reference, teacher and reward model; the module of such a part is the model's name."""


class StaticPart(NamedTuple):
    """Bytes of one storage that belong to one module.

    Attributes:
        block: number of the storage.
        chunk: of the rank.
        kind: PARAMETERS, GRADIENTS, MASTERS, MOMENTS, WORKSPACE, or what the block says of itself ("weight copies").
        module: global name; "padding" is what a buffer has beyond its parameters.
    """

    block: int
    chunk: int
    kind: str
    module: str
    size: int


def static_parts(chunks: list[Any], optimizer: Any, recorder: Recorder) -> list[StaticPart]:
    """Every byte of every storage that is alive, once. Called when the rank is built."""
    left = {number: recorder.blocks[number].size for number in recorder.alive()}
    owners: dict[int, tuple[int, str]] = {}
    parts = []
    for chunk, kind, module, tensor in _named_tensors(chunks, optimizer):
        number = recorder.number(tensor)
        if number is None or owners.setdefault(number, (chunk, kind))[1] != kind:
            continue  # a master weight that is the parameter itself
        size = min(tensor.numel() * tensor.element_size(), left[number])
        left[number] -= size
        parts.append(StaticPart(number, chunk, kind, module, size))
    for number, size in left.items():
        if size:
            chunk, kind = owners.get(number, (0, recorder.blocks[number].kind or WORKSPACE))
            module = PADDING if number in owners else recorder.blocks[number].module
            parts.append(StaticPart(number, chunk, kind, module, size))
    return parts


def _named_tensors(chunks: list[Any], optimizer: Any) -> Iterator[tuple[int, str, str, Tensor]]:
    """(chunk, kind, module, tensor) of everything that belongs to a parameter."""
    owners = {
        param: (index, name.rpartition(".")[0])
        for index, chunk in enumerate(chunks)
        for name, param in named_parameters([chunk])
    }
    for param, (chunk, module) in owners.items():
        yield chunk, PARAMETERS, module, getattr(param, "stored", param)  # a parameter in FP8 has its bytes there
        if (gradient := getattr(param, "main_grad", None)) is not None:
            yield chunk, GRADIENTS, module, gradient
    for inner in inner_optimizers(optimizer):
        for param, master, _ in masters_of(inner):
            chunk, module = owners[param]
            yield chunk, MASTERS, module, master
            for moment in inner.optimizer.state.get(master, {}).values():
                if isinstance(moment, Tensor) and moment.dim():
                    yield chunk, MOMENTS, module, moment
