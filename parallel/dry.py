"""The dry world: one process plays any rank of a job of any size. Tensors have shapes and no values.

``FakeTensorMode`` stands in for memory and torch's ``fake`` backend for the other ranks; the model, its wrappers, the
schedule and the optimizer are core's and ours, as in a run. What needs values is answered here: every exchange is done
at once, every scalar is one, and a router spreads its tokens evenly. Substitutions hold as long as the world does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.device import Substitution
from megatron_slm.parallel.groups import build_groups, destroy_groups
from megatron_slm.parallel.router import Router

DRY_SUBSTITUTIONS = (
    Substitution(
        "torch.distributed.all_gather_object",
        "pickles what every rank says; nobody else is there to say anything",
        "every rank says what this one does",
    ),
    Substitution(
        "nn.Module._apply",
        "torch swaps a fake parameter for its converted self, which it refuses where anything refers to it",
        "the converted parameter takes the other's place, with its attributes",
    ),
    Substitution(
        "clip_grads.l2_norm_impl",
        "makes a tensor of a list of norms by reading them",
        "the norm of the stacked norms, as Transformer Engine's and apex's kernels need no list",
    ),
    Substitution(
        "moe_utils.topk_routing_with_score_function",
        "which expert a token is sent to is a value, and decides sizes",
        "core's weights, and an even choice that has values",
    ),
    Substitution(
        "token_dispatcher.sort_chunks_by_idxs",
        "reads in which order it puts the tokens of experts and ranks",
        "every part once, in the order in which it came",
    ),
    Substitution(
        "mappings._gather_along_first_dim",
        "gathers how many tokens every rank has for each expert",
        "counts that have values are those of every rank",
    ),
    Substitution(
        "Router._within_capacity",
        "drops tokens by their weights, which have no values, among those of all ranks",
        "every rank keeps the first of its own tokens, as many as any other rank",
    ),
    Substitution(
        "{MoEAux,MTP}LossAutoScaler.main_loss_backward_scale",
        "core keeps the first one that it is given, and nothing that is made here may outlive the world",
        "what it was before, again afterwards",
    ),
    Substitution(
        "torch.UntypedStorage.copy_",
        "copies values back into what was recomputed; of fake storages it keeps both alive",
        "nothing",
    ),
)


@contextlib.contextmanager
def dry_world(config: ParallelConfig, *, rank: int, world_size: int) -> Iterator[ProcessGroupCollection]:
    """Be ``rank`` of ``world_size`` ranks without any of them; gives the process groups of the layout.

    Everything that is made inside is fake and must not outlive it. ``device.preload("cpu")`` comes before.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        # The groups' ranks are numbers that have to be real: they are made before anything is fake.
        groups = build_groups(config)
        with _substituted(), FakeTensorMode(allow_non_fake_inputs=True), Answers():
            yield groups
    finally:
        destroy_groups()


class Answers(TorchDispatchMode):
    """What would ask another rank, or a value, is answered. Ops among tensors that have values keep their values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One op."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor, which it answers itself
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return exchanged(func, args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _scalar(args[0].dtype)
        if func is torch.ops.aten.masked_select.default and not isinstance(args[1], FakeTensor):
            return _selected(args[0], args[1])
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def exchanged(func: Any, args: Sequence[Any]) -> Any:
    """A collective that is over; buffers stay as they are."""
    work = FakeWork().boxed()
    returned = len(func._schema.returns)
    return None if returned == 0 else work if returned == 1 else (args[0], work)


def _scalar(dtype: torch.dtype) -> float | int | bool:
    """A harmless value: flags are off, and one can be divided by."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _selected(values: Tensor, mask: Tensor) -> Tensor:
    """``values.masked_select(mask)`` of a mask that has values."""
    with unset_fake_temporarily():
        count = int(mask.broadcast_to(values.shape).sum())
    return values.new_empty(count)


@contextlib.contextmanager
def _substituted() -> Iterator[None]:
    """Apply ``DRY_SUBSTITUTIONS``; everything is as before afterwards."""
    choose, within = moe_utils.topk_routing_with_score_function, Router._within_capacity
    with contextlib.ExitStack() as stack:
        for owner, name, becomes in (
            (dist, "all_gather_object", _everyone_says_the_same),
            (nn.Module, "_apply", _replace_parameters),
            (clip_grads, "l2_norm_impl", _norm_of_norms),
            (moe_utils, "topk_routing_with_score_function", _evenly(choose)),
            (token_dispatcher, "sort_chunks_by_idxs", _in_order(token_dispatcher.sort_chunks_by_idxs)),
            (mappings, "_gather_along_first_dim", _counts_alike(mappings._gather_along_first_dim)),
            (Router, "_within_capacity", _within_share(within)),
            (moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
            (MTPLossAutoScaler, "main_loss_backward_scale", MTPLossAutoScaler.main_loss_backward_scale),
            (torch.UntypedStorage, "copy_", lambda storage, source, non_blocking=None: storage),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, becomes)
        yield


def _everyone_says_the_same(found: list[Any], said: Any, group: Any = None) -> None:
    found[:] = [said] * len(found)


def _norm_of_norms(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *rest: Any) -> tuple[Tensor, None]:
    norms = [tensor.norm() for tensor in lists[0]]
    return torch.stack(norms).norm().view(1), None


def _counts_alike(gather: Any) -> Any:
    """``_gather_along_first_dim`` of what has values."""

    def gathered(rows: Tensor, group: dist.ProcessGroup, *rest: Any) -> Tensor:
        if isinstance(rows, FakeTensor):
            found: Tensor = gather(rows, group, *rest)
            return found
        with unset_fake_temporarily():
            return rows.repeat(group.size(), *[1] * (rows.dim() - 1))

    return gathered


def _evenly(choose: Any) -> Any:
    """``topk_routing_with_score_function`` whose tokens go around the experts."""

    def route(logits: Tensor, topk: int, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weights, _ = choose(logits, topk, *rest, **options)
        return weights, even_choice(logits.shape[0], logits.shape[1], topk)

    return route


def even_choice(tokens: int, experts: int, topk: int) -> Tensor:
    """Choice [T, E] with values: every expert is chosen as often as any other, or once more."""
    with unset_fake_temporarily():
        first = torch.arange(tokens)[:, None] * topk
        chosen = (first + torch.arange(topk)) % experts
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)


def _in_order(sort: Any) -> Any:
    """``sort_chunks_by_idxs`` by numbers that have values."""

    def sorted_parts(tokens: Tensor, sizes: Tensor, order: Tensor, **options: Any) -> Any:
        with unset_fake_temporarily():
            order = torch.arange(len(order))
        return sort(tokens, sizes, order, **options)

    return sorted_parts


def _within_share(within: Any) -> Any:
    """``Router._within_capacity`` where every rank has the same room for each expert."""

    def kept(router: Router, probs: Tensor, chosen: Tensor, shape: tuple[int, int, int]) -> Tensor:
        within(router, chosen.float(), chosen, shape)  # for what it allocates and exchanges
        ranks = router.tp_group.size() * router.cp_group.size()
        tokens, factor = len(chosen) * ranks * router.topk, router.config.moe_expert_capacity_factor
        room = -(-moe_utils.get_capacity(tokens, shape[-1], factor) // ranks)
        with unset_fake_temporarily():
            return chosen & (chosen.cumsum(dim=0) <= room)

    return kept


def _replace_parameters(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` by assignment."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for name, param in module._parameters.items():
        if param is None:
            continue
        with torch.no_grad():
            converted = convert(param)
        if converted is not param:
            replaced = nn.Parameter(converted, requires_grad=param.requires_grad)
            replaced.__dict__.update(param.__dict__)
            module._parameters[name] = replaced
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module
