"""A range around every collective while it is asked for, with its axis and bytes.

All of them, whoever asks (core's aliases of torch's functions included), pass torch's dispatcher as ``c10d::`` ops. A
kernel of the Autograd key, which they have none for, sees them and lets them go on; taken away it costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_slm.profile import names
from megatron_slm.profile.names import Exchanged
from megatron_slm.profile.ranges import Ranges

OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
}
"""Op of the dispatcher -> its name in ``torch.distributed``."""
_OUTPUT_FIRST = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"})
"""Their outputs stand before their inputs."""
_KEYS = ("AutogradCPU", "AutogradCUDA")
AXES = (
    "tp",
    "pp",
    "cp",
    "dp",
    "dp_cp",
    "ep",
    "expt_tp",
    "expt_dp",
    "tp_ep",
    "embd",
    "tp_cp",
    "tp_dp_cp",
    "mp",
    "intra_dist_opt",
)
"""Fields of core's collection of groups whose names are kept, where two are one group the earlier."""
_CALLED = {
    "dp_cp": "dp",
    "expt_tp": "etp",
    "expt_dp": "edp",
    "tp_ep": "etp-ep",
    "tp_cp": "tp-cp",
    "tp_dp_cp": "tp-dp",
    "mp": "tp-pp",
    "intra_dist_opt": "world",
}


def axes_of(groups: Any) -> dict[str, str]:
    """Name of every process group of this rank -> its axis.

    Args:
        groups: core's collection.
    """
    world = torch.distributed.group.WORLD
    found: dict[str, str] = {world.group_name: "world"} if world is not None else {}
    for field in reversed(AXES):
        group = getattr(groups, field, None)
        if isinstance(group, torch.distributed.ProcessGroup):
            found[group.group_name] = _CALLED.get(field, field)
    return found


@contextlib.contextmanager
def collective_ranges(ranges: Ranges, axes: Mapping[str, str]) -> Iterator[None]:
    """For a while, every collective of this process is a range of its own while it is asked for.

    Args:
        axes: see :func:`axes_of`; a group that is not there has the axis "other".
    """
    library = torch.library.Library("c10d", "IMPL")
    try:
        for name, operation in OPERATIONS.items():
            op = getattr(torch.ops.c10d, name).default
            for key in _KEYS:
                library.impl(name, partial(_ranged, op, operation, ranges, axes), key, with_keyset=True)
        yield
    finally:
        library._destroy()


def _ranged(op: Any, operation: str, ranges: Ranges, axes: Mapping[str, str], keys: Any, *arguments: Any) -> Any:
    """One collective, on its way to the backend."""
    token = ranges.open(names.collective(_exchanged(operation, arguments, axes)))
    try:
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
    finally:
        ranges.close(token)


def _exchanged(operation: str, arguments: tuple[Any, ...], axes: Mapping[str, str]) -> Exchanged:
    given = [argument for argument in arguments if _bytes(argument)]
    size = _bytes(given[-1 if operation in _OUTPUT_FIRST else 0]) if given and operation != "barrier" else 0
    return Exchanged(operation, names.axis_of(operation, axes.get(_group_name(arguments), "other")), size)


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def _group_name(arguments: tuple[Any, ...]) -> str:
    unbox: Callable[[Any], Any] = torch._C._distributed_c10d.ProcessGroup.unbox
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return str(unbox(argument).group_name)
    return ""
