"""The optimizer in a checkpoint: master weights and moments in the places of the weights, and one step for all of them.

Core 0.16.1 stores another thing for every kind of optimizer, and what it stores of the distributed one is shifted
behind a padded bucket (``sharded_param_state_fully_reshardable`` concatenates buckets without their padding and slices
the result at offsets that count it). Here the form is one: ``optimizer.state.exp_avg.NAME`` is a tensor like the weight
NAME, cut as the weight is. So it does not matter under which layout, with how many optimizers (a model with experts has
two, where experts are divided) and by which of core's optimizers it was saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.optimizer_state import dividing_groups, inner_optimizers, masters_of

PREFIX = "optimizer.state."
STATES = ("param", "exp_avg", "exp_avg_sq")
"""The master weights and Adam's moments, as core's distributed optimizer names them."""


def optimizer_shards(optimizer: MegatronOptimizer, chunks: list[Any], models: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of ``optimizer``: sharded tensors, and the number of updates. Collective.

    Where data-parallel ranks hold parts, each tensor is put together on the first of them, which writes it; the others
    know its shape alone.

    Args:
        chunks: wrapped model chunks of this rank.
        models: their sharded state, by the names of ``checkpoint``.
    """
    groups, held = dividing_groups(optimizer), _held(optimizer)
    shards = {}
    for place, param, entry in _entries(chunks, models):
        if param not in groups:  # it is not trained
            continue
        start, tensors = held.get(param, (0, {}))
        for state in STATES:
            data = _on_first(param, tensors.get(state), start, groups[param])
            shards[f"{place}.{state}"] = under_prefix(entry, f"{PREFIX}{state}.", data)
    steps: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(steps, _step(optimizer))  # the first rank may hold nothing that is trained
    return {"step": max(steps), "shards": shards}


def optimizer_request(
    optimizer: MegatronOptimizer, chunks: list[Any], models: dict[str, Any], stored: Collection[str]
) -> dict[str, Any]:
    """What to ask a checkpoint for, so that ``load_optimizer_state`` can take it.

    Args:
        stored: names of the tensors in the checkpoint. Those saved before this form existed have master weights under
            the name of core's other optimizer, or, of an fp32 model without the distributed optimizer, none.
    """
    saved = {name.removeprefix(PREFIX).partition(".")[0] for name in stored if name.startswith(PREFIX)}
    names = {"param": "param" if "param" in saved else "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    trained = dividing_groups(optimizer)
    return {
        "shards": {
            f"{place}.{state}": under_prefix(entry, f"{PREFIX}{name}.", torch.empty(param.shape, dtype=_exact(param)))
            for place, param, entry in _entries(chunks, models)
            if param in trained
            for state, name in names.items()
            if name in saved or state != "param"
        }
    }


def load_optimizer_state(optimizer: MegatronOptimizer, chunks: list[Any], loaded: dict[str, Any]) -> None:
    """Put into ``optimizer`` what ``optimizer_request`` has asked for: masters, moments and step, no hyper-parameter.

    The model's weights must have been loaded: they are the masters where the checkpoint has none.

    Raises:
        CheckpointError: the checkpoint does not say how many updates were made.
    """
    step, shards = _stored_step(loaded), loaded["shards"]
    held = _held(optimizer)
    with torch.no_grad():
        if not any(name.endswith(f".{STATES[0]}") for name in shards):
            optimizer.reload_model_params()
        for place, param in _places(chunks):
            start, tensors = held.get(param, (0, {}))
            for state, tensor in tensors.items():
                if (name := f"{place}.{state}") in shards:
                    part = shards[name].reshape(-1)[start : start + tensor.numel()]
                    tensor.copy_(part.view_as(tensor))
    _set_step(optimizer, step)


def under_prefix(entry: Any, prefix: str, data: Tensor | None = None) -> Any:
    """A weight's sharded entry under another key and with ``data``; what is no tensor stays as it is."""
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=prefix + entry.key, data=entry.data if data is None else data)
    if isinstance(entry, ShardedTensor):
        data = entry.data if data is None else data
        return replace(entry, key=prefix + entry.key, data=data, dtype=data.dtype)
    return entry


def _places(chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under its place on this rank: the number of its chunk and its name there."""
    for number, chunk in enumerate(chunks):
        for name, param in unwrap(chunk).named_parameters():
            yield f"{number}.{name}", param


def _entries(chunks: list[Any], models: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Every parameter with its place and the sharded entry of its weight."""
    states = list(models.values())
    for place, param in _places(chunks):
        number, _, name = place.partition(".")
        yield place, param, states[int(number)][name]


def _held(optimizer: MegatronOptimizer) -> dict[nn.Parameter, tuple[int, dict[str, Tensor]]]:
    """Of each parameter that this rank updates (a part of): where the part begins, and its tensors by state."""
    return {
        param: (start, {"param": tensor.detach(), **_moments(inner.optimizer.state.get(tensor, {}))})
        for inner in inner_optimizers(optimizer)
        for param, tensor, start in masters_of(inner)
    }


def _moments(values: dict[str, Any]) -> dict[str, Tensor]:
    return {state: values[state] for state in STATES[1:] if state in values}


def _on_first(param: nn.Parameter, part: Tensor | None, start: int, group: dist.ProcessGroup | None) -> Tensor:
    """One state of one parameter, in its shape and in full precision; collective over ``group``.

    On the host of the group's first rank, without data on the others. Without a group it is ``part`` itself.
    """
    exact = _exact(param)
    if group is None:
        whole = torch.zeros(param.shape, dtype=exact) if part is None else part
        return whole.view(param.shape)
    whole = torch.zeros(param.numel(), dtype=exact, device=param.device)
    if part is not None:
        whole[start : start + part.numel()] = part.view(-1)
    # One rank holds each element. As integers the zeros of the others change no bit, not even that of -0.0.
    bits = whole.view(torch.int64 if exact == torch.float64 else torch.int32)
    dist.reduce(bits, dist.get_global_rank(group, 0), group=group)
    return whole.view(param.shape).cpu() if group.rank() == 0 else torch.empty(param.shape, dtype=exact, device="meta")


def _exact(param: nn.Parameter) -> torch.dtype:
    """The format of a parameter's master weights."""
    return torch.promote_types(param.dtype, torch.float32)


def _step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far. All parameters have taken part in each."""
    steps = {0}
    for inner in inner_optimizers(optimizer):
        steps |= {int(values["step"]) for values in inner.optimizer.state.values() if "step" in values}
        steps |= {int(group["step"]) for group in inner.optimizer.param_groups if "step" in group}
    return max(steps)


def _set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """torch's AdamW counts for each parameter, Transformer Engine's and apex's Adam for each group."""
    for inner in inner_optimizers(optimizer):
        for values in inner.optimizer.state.values():
            if "step" in values:
                values["step"].fill_(step)
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            for group in inner.optimizer.param_groups:
                group["step"] = step


def _stored_step(stored: dict[str, Any]) -> int:
    """The number of updates, also where core has stored it.

    Raises:
        CheckpointError: it is not there.
    """
    core = stored.get("optimizer", stored)
    groups = core.get("param_groups") or [{}]
    for values, key in ((stored, "step"), (core.get("state", {}), "common_step"), (groups[0], "step")):
        if key in values:
            return int(values[key])
    if groups != [{}]:  # core leaves a step of 0 out
        return 0
    raise CheckpointError("the checkpoint does not say how many updates its optimizer has made; choose another one")
