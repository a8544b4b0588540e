"""What gloo allocates beside the tensors that it is given.

Seen in torch's profiler with torch 2.13 (``ProcessGroupGloo``): it has no collective over one flat tensor, so that it
works on copies. They are there until the exchange is over. Sends and all-reduces need none. An all-gather makes two
copies, one after the other: the calling thread's goes when the call returns, gloo's own comes when its thread begins.
Where the thread is the faster one both exist for an instant, which is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def gloo_temporary_bytes(name: str, args: Sequence[Any]) -> int:
    """Bytes that exist beside the arguments of a collective while it runs.

    Args:
        name: of the op, as torch names it: "c10d._allgather_base_".
        args: of the op; outputs come first.
    """
    if name in ("c10d._reduce_scatter_base_", "c10d.reduce_scatter_tensor_coalesced_"):
        return _bytes(args[1])
    if name in ("c10d._allgather_base_", "c10d.allgather_", "c10d.allgather_into_tensor_coalesced_"):
        return _bytes(args[0])
    return 0


def _bytes(tensors: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
