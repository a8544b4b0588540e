"""What an optimizer holds: master weights by name, the ranks over which they are divided, and first moments of zero."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap

LAYER_PREFIX = "decoder.layers."
EXPERT_MARKER = ".experts.local_experts."


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
        for param, tensor, start in masters_of(inner)
    ]


def named_parameters(chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the chunks under its global name (see :class:`Master`)."""
    for chunk in map(unwrap, chunks):
        for name, param in chunk.named_parameters():
            yield global_name(chunk, name), param


def global_name(chunk: Any, name: str) -> str:
    """The name of a parameter or module of an unwrapped chunk, its layer and expert counted over the whole model."""
    layer, marker, rest = name.partition(EXPERT_MARKER)
    if marker:
        index, dot, rest = rest.partition(".")
        name = f"{layer}{marker}{chunk.get_submodule(layer).local_expert_indices[int(index)]}{dot}{rest}"
    if not name.startswith(LAYER_PREFIX):
        return name
    index, dot, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return f"{LAYER_PREFIX}{chunk.decoder.layers[int(index)].layer_number - 1}{dot}{rest}"


def counts_once(master: Master, optimizer: MegatronOptimizer, groups: Any) -> bool:
    """Whether this rank contributes ``master`` to a sum over the world in which every element counts once.

    A parameter that tp ranks replicate counts on the first of them, a tied embedding on the first pipeline stage, and a
    master that data-parallel ranks replicate on the first of them: what core's gradient norm counts.
    """
    # Experts that have replicas of their own; see ``parallel.experts.mark_expert_weights``.
    replicas = groups.dp_cp if getattr(master.param, "allreduce", True) else groups.expt_dp
    divided = any(isinstance(inner, DistributedOptimizer) for inner in inner_optimizers(optimizer))
    return bool(
        param_is_not_shared(master.param)
        and param_is_not_tensor_parallel_duplicate(master.param, groups.tp)
        and (divided or replicas.rank() == 0)
    )


def masters_of(inner: Any) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """(parameter, master, offset in the flattened parameter) of everything that one of core's optimizers holds."""
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


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Core's optimizers that hold a torch optimizer; one for a dense model."""
    parts: list[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def dividing_groups(optimizer: MegatronOptimizer) -> dict[nn.Parameter, dist.ProcessGroup | None]:
    """Of every trained parameter the ranks over which its master is divided; None where this rank holds all of it.

    Experts are divided over other ranks than the rest of the model.
    """
    groups: dict[nn.Parameter, dist.ProcessGroup | None] = {}
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            params = chain.from_iterable(buffer.param_index_map for buffer in inner.buffers)
            groups |= dict.fromkeys(params, inner.data_parallel_group)
        else:
            groups |= dict.fromkeys((param for param, _, _ in masters_of(inner)), None)
    return groups


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Create the moments now instead of at the first step: a checkpoint is read into them."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            inner.init_state_fn(inner.optimizer, inner.config)
            continue
        for group in inner.optimizer.param_groups:
            for param in group["params"]:
                inner.optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
