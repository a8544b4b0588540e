"""What stands in for functions of core and of ``torch.cuda`` on CPU ranks; ``device.py`` puts it there and says why."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class HostStream:
    """A stream, and an event, of a device that has neither: whatever was asked for has been done already."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> HostStream:
        """The moment that has passed."""
        return self


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    """State of the one generator of the host."""
    return torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the one generator of the host."""
    torch.set_rng_state(new_state)


@contextlib.contextmanager
def fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """``CudaRNGStatesTracker.fork`` over the one CPU generator; nested forks save the outer named state, as in core."""
    assert name in tracker.states_, (
        f"RNG state {name!r} is not one of {sorted(tracker.states_)}: seed the tracker first"
    )
    original_state = get_rng_state()
    original_name = tracker._current_state_name
    if original_name != "default-rng":
        tracker.states_[original_name] = original_state
    set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = get_rng_state()
        if original_name != "default-rng":
            original_state = tracker.states_[original_name]
        set_rng_state(original_state)
        tracker._current_state_name = original_name


def keep_float64_gradients(core_method: Callable[[Any], None]) -> Callable[[Any], None]:
    """``_copy_model_grads_to_main_grads`` that hands a float64 parameter its gradient shard as it is."""
    if getattr(core_method, "keeps_float64", False):
        return core_method

    def copy(optimizer: Any) -> None:
        shards = list(zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True))
        if not any(param.dtype == torch.float64 for params, _ in shards for param in params):
            return core_method(optimizer)
        for params, main_params in shards:
            for param, main in zip(params, main_params, strict=True):
                owned = optimizer._get_model_param_range_map(param)["param"]
                main.grad = param.main_grad.view(-1)[owned.start : owned.end]
        return None

    copy.keeps_float64 = True  # type: ignore[attr-defined]
    return copy


def keep_float64_scores(core_function: Callable[..., Any]) -> Callable[..., Any]:
    """``topk_routing_with_score_function`` that scores float64 logits in float64."""
    if getattr(core_function, "keeps_float64", False):
        return core_function
    code, wider = core_function.__code__, {"float": "double", "float32": "float64"}
    names = tuple(wider.get(name, name) for name in code.co_names)
    exact = types.FunctionType(code.replace(co_names=names), core_function.__globals__)
    exact.__defaults__, exact.__kwdefaults__ = core_function.__defaults__, core_function.__kwdefaults__

    def route(logits: Tensor, *rest: Any, **options: Any) -> Any:
        return (exact if logits.dtype == torch.float64 else core_function)(logits, *rest, **options)

    route.keeps_float64 = True  # type: ignore[attr-defined]
    return route


def counts_as_array(tensor: Tensor | None, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu`` of what is on the host already."""
    return tensor.numpy() if as_numpy and tensor is not None else tensor


Exchange = Callable[..., Tensor]


def uneven_gather(core_function: Exchange) -> Exchange:
    """``_gather_along_first_dim`` whose ranks may give different numbers of rows."""
    if getattr(core_function, "takes_uneven", False):
        return core_function

    def gather(
        rows: Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return core_function(rows, group, sizes, use_global_buffer)
        whole = rows.new_zeros((sum(sizes), *rows.shape[1:]))
        whole.split(list(sizes))[group.rank()].copy_(rows)
        dist.all_reduce(whole, group=group)
        return whole

    gather.takes_uneven = True  # type: ignore[attr-defined]
    return gather


def uneven_scatter(core_function: Exchange) -> Exchange:
    """``_reduce_scatter_along_first_dim`` whose ranks may take different numbers of rows."""
    if getattr(core_function, "takes_uneven", False):
        return core_function

    def scatter(
        rows: Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return core_function(rows, group, sizes, use_global_buffer)
        whole = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole.split(list(sizes))[group.rank()].clone()

    scatter.takes_uneven = True  # type: ignore[attr-defined]
    return scatter
