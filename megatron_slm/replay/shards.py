"""What the ranks of a job hold, under names and places that do not depend on the layout.

A tensor that several ranks hold (a norm under tp, anything under dp, a tied embedding) is kept once for each of them:
copies that have drifted apart are a fault like any other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.parallel.initialise import shards
from megatron_slm.train.optimizer_state import Master, inner_optimizers, named_masters

LAYERS = "decoder.layers."
NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Core's key in a checkpoint -> the module that holds the parameter (``parallel/specs.py`` maps them the other way)."""


class Shard(NamedTuple):
    """One rank's part of one global tensor.

    Attributes:
        name: of the global tensor, layers counted over the whole model: ``decoder.layers.3.mlp.linear_fc1.weight``.
        shape: of the global tensor.
        place: where the part lies in it.
        values: the part. NaN where another rank owns the element (a distributed optimizer's state).
    """

    name: str
    shape: tuple[int, ...]
    place: tuple[slice, ...]
    values: Tensor


def local_shards(chunks: Iterable[Any], values: Mapping[Any, Tensor] | None = None) -> list[Shard]:
    """This rank's parameters, or ``values`` of the same shapes (and any format) in their place, copied.

    Args:
        values: of every parameter. What is stored beside the parameters, as a router's bias, is then left out.
    """
    models = [unwrap(chunk) for chunk in chunks]
    found = shards(models)
    if values is None:
        return [_shard(shard, shard.data) for shard in found]
    # Not by putting the values into the parameters: torch forgets a parameter's gradient hooks when its format changes.
    params = sorted((param for model in models for param in model.parameters()), key=lambda param: param.data_ptr())
    starts = [param.data_ptr() for param in params]
    result = []
    for shard in found:
        param = params[max(0, bisect.bisect_right(starts, shard.data.data_ptr()) - 1)]
        offset = (shard.data.data_ptr() - param.data_ptr()) // param.element_size()
        if 0 <= offset < param.numel():  # else a buffer of the model, which has neither gradient nor moments
            part = values[param].contiguous().as_strided(shard.data.shape, shard.data.stride(), offset)
            result.append(_shard(shard, part))
    return result


def master_shards(
    chunks: list[Any], optimizer: MegatronOptimizer, pick: Callable[[Master, Mapping[str, Tensor]], Tensor | None]
) -> list[Shard]:
    """Something of every master weight of this rank: itself, its gradient, a moment.

    Args:
        pick: (master, its optimizer state) -> a tensor as long as the master, or None, which is all NaN.
    """
    states = {param: state for inner in inner_optimizers(optimizer) for param, state in inner.optimizer.state.items()}
    values = {
        param: torch.full(param.shape, math.nan, dtype=_master_dtype(param))
        for chunk in chunks
        for param in chunk.parameters()
    }
    for master in named_masters(optimizer, chunks):
        picked = pick(master, states.get(master.tensor, {}))
        if picked is not None:
            flat = picked.detach().reshape(-1)
            values[master.param].view(-1)[master.start : master.start + flat.numel()] = flat
    return local_shards(chunks, values)


def gradient_shards(chunks: list[Any], optimizer: MegatronOptimizer) -> list[Shard]:
    """Reduced gradients, between ``prepare_grads`` and the update, before they are clipped."""
    return master_shards(chunks, optimizer, lambda master, state: master.tensor.grad)


def assembled(shards_of_ranks: Iterable[Iterable[Shard]]) -> dict[str, Tensor]:
    """Global tensors by name; of copies the last one counts, NaN where no rank owns the element."""
    whole: dict[str, Tensor] = {}
    for shard in (shard for rank in shards_of_ranks for shard in rank):
        tensor = whole.setdefault(shard.name, torch.full(shard.shape, math.nan, dtype=shard.values.dtype))
        tensor[shard.place] = torch.where(shard.values.isnan(), tensor[shard.place], shard.values)
    return whole


def _shard(found: Any, values: Tensor) -> Shard:
    """Core's sharded tensor with its stacked axes (the layer, the expert) taken into the name."""
    stacked = found.prepend_axis_num
    shape, offset = found.global_shape[stacked:], found.global_offset[stacked:]
    place = tuple(slice(start, start + size) for start, size in zip(offset, found.local_shape, strict=True))
    name = _name(found.key, found.global_offset[:stacked])
    return Shard(name, tuple(shape), place, values.detach().clone().view(found.local_shape))


def _name(key: str, stacked: tuple[int, ...]) -> str:
    """Core's key and its place on stacked axes -> the parameter's name."""
    numbers = iter(stacked)
    if key.startswith(LAYERS) and stacked and not key.removeprefix(LAYERS).partition(".")[0].isdigit():
        key = f"{LAYERS}{next(numbers)}.{key.removeprefix(LAYERS)}"
    for stored, module in NORMS.items():
        key = key.replace(stored, module)
    return "".join([key, *(f"[{number}]" for number in numbers)])


def _master_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32
