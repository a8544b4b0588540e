"""What an optimizer holds: master weights by name; moments and steps, made before a save and put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap

LAYER_PREFIX = "decoder.layers."


class Master(NamedTuple):
    """What this rank's optimizer updates of one parameter.

    Attributes:
        name: global name, the same under every layout: ``decoder.layers.3.mlp.linear_fc1.weight``, layers counted
            from 0 over the whole model.
        param: the model's parameter (this rank's tp part of it), in the model's format.
        tensor: the master weights: elements ``start`` to ``start + tensor.numel()`` of the flattened ``param``. After
            ``prepare_grads`` its ``grad`` is their gradient, reduced. fp32, or float64 where the model is.
    """

    name: str
    param: nn.Parameter
    tensor: Tensor
    start: int


def named_masters(optimizer: MegatronOptimizer, chunks: list[Any]) -> list[Master]:
    """Every master weight this rank holds.

    With the distributed optimizer the data-parallel ranks hold disjoint parts of each parameter, some parameters not at
    all; without it each holds all of them. In an fp32 model a master is (a view of) the parameter itself.
    """
    names = {param: name for name, param in named_parameters(chunks)}
    return [
        Master(names[param], param, tensor, start)
        for inner in inner_optimizers(optimizer)
        for param, tensor, start in _masters(inner)
    ]


def named_parameters(chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the chunks under its global name (see :class:`Master`)."""
    for chunk in map(unwrap, chunks):
        for name, param in chunk.named_parameters():
            yield global_name(chunk, name), param


def global_name(chunk: Any, name: str) -> str:
    """The name of a parameter or module of an unwrapped chunk with its layer counted over the whole model."""
    if not name.startswith(LAYER_PREFIX):
        return name
    index, dot, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return f"{LAYER_PREFIX}{chunk.decoder.layers[int(index)].layer_number - 1}{dot}{rest}"


def counts_once(master: Master, optimizer: MegatronOptimizer, groups: Any) -> bool:
    """Whether this rank contributes ``master`` to a sum over the world in which every element counts once.

    A parameter that tp ranks replicate counts on the first of them, a tied embedding on the first pipeline stage, and a
    master that data-parallel ranks replicate on the first of them: what core's gradient norm counts.
    """
    divided = any(isinstance(inner, DistributedOptimizer) for inner in inner_optimizers(optimizer))
    return bool(
        param_is_not_shared(master.param)
        and param_is_not_tensor_parallel_duplicate(master.param, groups.tp)
        and (divided or groups.dp_cp.rank() == 0)
    )


def _masters(inner: Any) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """(parameter, master, offset in the flattened parameter) of one of core's optimizers."""
    flat = chain.from_iterable
    if isinstance(inner, DistributedOptimizer):
        half = zip(flat(inner.model_float16_groups), flat(inner.shard_fp32_from_float16_groups), strict=True)
        full = zip(flat(inner.model_fp32_groups), flat(inner.shard_fp32_groups), strict=True)
        for param, tensor in chain(half, full):
            yield param, tensor, inner._get_model_param_range_map(param)["param"].start
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        for param, tensor in zip(flat(inner.float16_groups), flat(inner.fp32_from_float16_groups), strict=True):
            yield param, tensor, 0
        for param in flat(inner.fp32_from_fp32_groups):
            yield param, param, 0
    else:
        for group in inner.optimizer.param_groups:
            for param in group["params"]:
                yield param, param, 0


class BucketwiseState(DistributedOptimizer):
    """Core's distributed optimizer, whose gathered state lies where its readers look for it.

    Core 0.16.1 concatenates the buckets without their padding and then slices the result at offsets that count it
    (``sharded_param_state_fully_reshardable``): behind a padded bucket every moment and master weight is shifted, in
    the checkpoint and silently. Buckets are padded to multiples of lcm(dp, 128).
    """

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Core's state with each bucket's tensors moved to the bucket's own offset; None where core returns None."""
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:
            return None
        for number, buffer in enumerate(self.buffers):
            for tensors in state[number].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    if key in tensors:
                        tensors[key] = _spread(tensors[key], buffer)
        return state


def _spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Tensor [unpadded elements of all buckets] -> [elements of the buffer], padding zero."""
    spread, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return spread


def keep_buckets_in_place(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizers ``BucketwiseState``; core constructs the class by its own name."""
    for inner in inner_optimizers(optimizer):
        if type(inner) is DistributedOptimizer:
            inner.__class__ = BucketwiseState


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Core's optimizers that hold a torch optimizer; one for a dense model."""
    parts: list[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Create AdamW's moments now instead of at the first step: core can neither save nor load an empty state."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            continue
        for group in inner.optimizer.param_groups:
            for param in group["params"]:
                inner.optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put a loaded state into ``optimizer``: moments, master weights and steps, but no hyper-parameter.

    Core's own load is taken in parts, because as a whole, with torch's AdamW, it (1) looks for a step counter among the
    sharded tensors, where there is none, (2) lets all parameters share one counter, which AdamW would then advance once
    per parameter, and (3) replaces the configured rates, betas and decay by those of the checkpoint.
    """
    parts = inner_optimizers(optimizer)
    assert len(parts) == 1, "a dense model has one optimizer; chained ones are saved under their number"
    inner = parts[0]
    options = [_options(group) for group in inner.optimizer.param_groups]
    if isinstance(inner, DistributedOptimizer):
        tensors = state["param_state"]
        inner.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
        steps = {param: values.pop("step") for param, values in inner.optimizer.state.items() if "step" in values}
        inner.load_parameter_state_from_fully_reshardable(tensors)
        for param, step in steps.items():
            inner.optimizer.state[param]["step"] = step
    else:
        inner.load_state_dict(state)
    for values in inner.optimizer.state.values():
        if isinstance(values.get("step"), torch.Tensor):
            values["step"] = values["step"].clone()
    for group, kept in zip(inner.optimizer.param_groups, options, strict=True):
        group.update(kept)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration, not the checkpoint, decides in a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}
