"""Kernels of a GPU as the dry world sees them: what is read, what is written, how many operations; nothing is computed.

The stand-ins for Transformer Engine's modules (``declared_linear.py`` and its neighbours) allocate what the real ones
allocate, with torch, and name here the work between the allocations, so that whoever records the operators of a dry
run sees one operator of known kind, floating-point operations and bytes for every kernel launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE, COPY = "declared", "weight_copy"
SCHEMA = "kernel(str kind, int flops, Tensor[] reads, Tensor[] writes) -> ()"

Generation = Literal["ampere", "hopper", "blackwell"]
Loss = Literal["ours", "core", "core fused", "te"]
Backend = Literal["fused", "flash", "unfused"]

MIB = 2**20
GEMM_WORKSPACE_BYTES: dict[Generation, int] = {
    "ampere": 4 * MIB,
    "hopper": 32 * MIB + 1024,
    "blackwell": 32 * MIB + 1024,
}
"""Transformer Engine's for one stream (v2.11, ``pytorch/cpp_extensions/gemm.py``)."""
TORCH_WORKSPACE_BYTES: dict[Generation, int] = {
    "ampere": (8192 + 128) * 1024,
    "hopper": 32 * MIB,
    "blackwell": (8192 + 128) * 1024,
}
"""torch's for one cuBLAS handle (``aten/src/ATen/cuda/CublasHandlePool.cpp``): every thread has its own."""
GROUPED_GEMM_STREAMS = 4
TORCH_THREADS = 2
"""That multiply matrices: the main one and autograd's."""


@dataclass(frozen=True)
class Kernels:
    """Which of a GPU's kernels a program runs.

    Attributes:
        loss: our loss or the cross-entropy of a published Megatron run; see ``declared_loss.use_loss``.
        attention: "fused" (cuDNN's), "flash" (flash-attention's, which copies to batch-first and back) or "unfused".
        generation: of the GPU; decides the workspaces.
        deterministic: cuBLAS is given the workspaces that make it so (CUBLAS_WORKSPACE_CONFIG=:4096:8).
        keeps_dummy_gradients: what autograd is given for a weight whose gradient went elsewhere is made once for all
            weights of a shape; before, for every weight anew.
    """

    loss: Loss = "ours"
    attention: Backend = "fused"
    generation: Generation = "hopper"
    deterministic: bool = False
    keeps_dummy_gradients: bool = True


KERNELS: ContextVar[Kernels] = ContextVar("KERNELS")
"""Set by ``parallel.declared.declared_kernels``."""

PERSISTENT: dict[Any, Tensor] = {}
"""What a process of the real program allocates once and keeps; ``parallel.declared.declared_kernels`` empties it."""


@functools.cache
def operator() -> Callable[..., None]:
    """``torch.ops.declared.kernel.default``: in a dispatch mode its arguments say what a kernel does."""
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define(SCHEMA)
    library.impl("kernel", lambda kind, flops, reads, writes: None, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
    packet = torch.ops.declared.kernel
    register_flop_formula(packet, get_raw=True)(lambda kind, flops, *rest, **options: flops)
    found: Callable[..., None] = packet.default
    return found


@functools.cache
def copy_operator() -> Callable[..., Tensor]:
    """``torch.ops.declared.weight_copy.default``, by whose name a copy of a weight is known."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"{COPY}(Tensor weight, int[] shape) -> Tensor")
    library.impl(COPY, lambda weight, shape: weight.new_empty(shape, dtype=torch.uint8), "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
    found: Callable[..., Tensor] = torch.ops.declared.weight_copy.default
    return found


def weight_copy(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A kernel that writes bytes of a new tensor, which is kept beside the weight that it is made of."""
    return copy_operator()(weight, list(shape))


_LIBRARIES: list[torch.library.Library] = []  # an operator goes with the object that defined it


def kernel(kind: str, reads: Sequence[Tensor], writes: Sequence[Tensor], flops: int = 0) -> None:
    """One kernel: "gemm", "attention" or "memory" (bound by the bytes it moves)."""
    operator()(kind, flops, list(reads), list(writes))


def persistent(key: Any, size: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The buffer that the real program keeps under ``key``, allocated by whoever asks first."""
    if key not in PERSISTENT:
        PERSISTENT[key] = like.new_empty(tuple(size), dtype=dtype or like.dtype)
    return PERSISTENT[key]


def matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, I] and weight [O, I] -> a new [T, O]."""
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    kernel("gemm", [rows, weight], [out], 2 * out.numel() * weight.shape[1])
    return out


def matmul_transposed(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, O] and weight [O, I] -> a new [T, I]: the gradient of the input."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    kernel("gemm", [rows, weight], [out], 2 * out.numel() * weight.shape[0])
    return out


def gather_rows(rows: Tensor, group: Any) -> Tensor:
    """[T, ...] -> a new [tp * T, ...] of all ranks of ``group``."""
    whole = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows, group=group)
    return whole


def scatter_rows(rows: Tensor, group: Any) -> Tensor:
    """[tp * T, ...] -> a new [T, ...], summed over ``group``."""
    part = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(part, rows, group=group)
    return part


def workspace(like: Tensor, *, grouped: bool = False) -> None:
    """cuBLAS's, kept by Transformer Engine from its first product on; of grouped products one a stream."""
    size = GEMM_WORKSPACE_BYTES[KERNELS.get().generation]
    for stream in range(GROUPED_GEMM_STREAMS if grouped else 1):
        persistent(("cuBLAS workspace of Transformer Engine", grouped, stream), [size], like, torch.uint8)


def torch_workspace(like: Tensor) -> None:
    """cuBLAS's for torch's own products, such as that of the output layer."""
    kernels = KERNELS.get()
    size = 32 * MIB if kernels.deterministic else TORCH_WORKSPACE_BYTES[kernels.generation]
    for thread in range(TORCH_THREADS):
        persistent(("cuBLAS workspace of torch", thread), [size], like, torch.uint8)


def accumulate_weight_gradient(grads: Tensor, rows: Tensor, weight: Tensor, *, accumulate: bool) -> Tensor | None:
    """Gradient of weight [O, I] from grads [T, O] and rows [T, I], or what autograd is given in its place.

    The product itself adds to ``main_grad`` where it accumulates; no gradient is made then.
    """
    flops = 2 * rows.numel() * weight.shape[0]
    if not accumulate:
        made = weight.new_empty(weight.shape)
        kernel("gemm", [grads, rows], [made], flops)
        return made
    kernel("gemm", [grads, rows], [weight.main_grad], flops)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return dummy_gradient(list(weight.shape), weight.dtype)


def dummy_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What autograd is given where a gradient was added to ``main_grad``: a tensor that nobody reads.

    One for all weights of a shape (``get_dummy_wgrad`` of ``pytorch/module/base.py``, since v2.3, and core's output
    layer), or made anew.
    """
    like = torch.empty(0, dtype=dtype)
    if not KERNELS.get().keeps_dummy_gradients:
        return like.new_empty(shape)
    return persistent((tuple(shape), dtype), shape, like).detach()
