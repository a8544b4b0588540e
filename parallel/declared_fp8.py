"""FP8 tensors of Transformer Engine in the dry world: what each recipe keeps of a tensor, and which recipe is in force.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/tensor/{float8,float8_blockwise,mxfp8}_tensor.py`` and their
``storage``, ``pytorch/distributed.py`` (gathers) and ``pytorch/module/fp8_padding.py``. Elements have one byte. A
matrix product reads its operands along the rows of one and the columns of the other: Hopper's FP8 tensor cores want
both along the rows, so that whatever is used either way is kept twice, once transposed. Blackwell's read a tensor that
has one scale either way; where every block has its own, the two directions have different values.

Shapes: T tokens, I channels. Not counted: scales and amax histories of delayed scaling, some hundred bytes a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_slm.parallel.declared_ops import KERNELS, kernel, weight_copy

Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
RECIPES: tuple[str, ...] = get_args(Recipe)
ONE_SCALE = ("delayed", "tensorwise")
"""Recipes whose tensors have a single scale."""
BLOCK, SMALL_BLOCK = 128, 32
"""Side of a block of ``blockwise`` (1 x 128 of activations, 128 x 128 of weights); elements of one of ``mxfp8``."""

AUTOCAST: ContextVar[Recipe | None] = ContextVar("AUTOCAST", default=None)
"""The recipe in force, as ``fp8_autocast`` sets it."""
PARAMETERS: ContextVar[Recipe | None] = ContextVar("PARAMETERS", default=None)
"""That of the parameters which are made meanwhile, as ``fp8_model_init`` sets it."""


@contextlib.contextmanager
def autocast(recipe: Recipe | None, of: ContextVar[Recipe | None] = AUTOCAST) -> Iterator[None]:
    """``fp8_autocast``; None switches FP8 off."""
    token = of.set(recipe)
    try:
        yield
    finally:
        of.reset(token)


def core_context(config: Any, layer_no: int = -1, is_init: bool = False) -> contextlib.AbstractContextManager[None]:
    """``fp8_utils.get_fp8_context``."""
    if not (config.fp8_param if is_init else config.fp8):
        return contextlib.nullcontext()
    return autocast(config.fp8_recipe, PARAMETERS if is_init else AUTOCAST)


class AutocastState:
    """``FP8GlobalStateManager`` and ``fp8_autocast``, as far as core's recomputation asks."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Whether a recipe is in force."""
        return AUTOCAST.get() is not None

    @staticmethod
    def get_fp8_recipe() -> Recipe | None:
        """The recipe in force."""
        return AUTOCAST.get()

    @staticmethod
    def again(enabled: bool = True, fp8_recipe: Recipe | None = None) -> contextlib.AbstractContextManager[None]:
        """``fp8_autocast(enabled, fp8_recipe)``."""
        return autocast(fp8_recipe if enabled else None)


def checkpoint(
    function: Callable[..., Any], distribute: bool, tracker: Any, group: Any, *args: Any, **named: Any
) -> Any:
    """``te_checkpoint``: core's recomputation, in whose second pass the same recipe is in force."""
    recipe = AUTOCAST.get()

    def recomputed(*tensors: Any) -> Any:
        with autocast(recipe):
            return function(*tensors, **named)

    return tensor_parallel.checkpoint(recomputed, distribute, *args)


class Quantized:
    """What is kept of a tensor [T, I]: bytes along its rows, and along its columns where those are others.

    Attributes:
        recipe: by which it was made.
        rows, columns: data and its scales; empty where that direction is not kept.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        self.recipe, self.rows, self.columns = recipe, list(rows), list(columns)

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [*self.rows, *self.columns]

    def keep_columns(self) -> None:
        """``update_usage(rowwise_usage=False, columnwise_usage=True)``."""
        if not read_either_way(self.recipe):
            self.rows = []

    def transpose(self) -> None:
        """``update_usage(columnwise_usage=True)`` of a tensor with one scale: made of the rows, which stay."""
        if not self.columns and not read_either_way(self.recipe):
            data, scale = self.rows
            self.columns = [data.new_empty(data.shape[1], data.shape[0]), scale]
            kernel("memory", [data], [self.columns[0]])


def read_either_way(recipe: Recipe) -> bool:
    """Whether one copy of a tensor serves products along its rows and along its columns."""
    return recipe in ONE_SCALE and KERNELS.get().generation == "blackwell"


def gathers_rows(recipe: Recipe) -> bool:
    """``supports_only_rowwise_all_gather``: what other ranks have arrives along the rows and is transposed here."""
    return recipe in ONE_SCALE


def quantize(x: Tensor, recipe: Recipe, *, rows: bool = True, columns: bool = True) -> Quantized:
    """x [T, I] in bf16 -> its FP8 copies."""
    made = empty(x, x.shape[0], x.shape[1], recipe, rows=rows, columns=columns)
    kernel("memory", [x], made.tensors)
    return made


def empty(
    like: Tensor, count: int, width: int, recipe: Recipe, *, rows: bool = True, columns: bool = True
) -> Quantized:
    """Room for the copies of a [T, I] tensor of ``count`` tokens and ``width`` channels (``make_empty``)."""
    along, across = _scales(count, width, recipe, weight=False)
    if recipe in ONE_SCALE:
        scale = like.new_empty(along, dtype=torch.float32)
        if read_either_way(recipe):
            return Quantized(recipe, [_data(like, count, width), scale], [])
        return Quantized(
            recipe,
            [_data(like, count, width), scale] if rows else [],
            [_data(like, width, count), scale] if columns else [],
        )
    kind = torch.uint8 if recipe == "mxfp8" else torch.float32
    return Quantized(
        recipe,
        [_data(like, count, width), like.new_empty(along, dtype=kind)] if rows else [],
        [_data(like, width, count), like.new_empty(across, dtype=kind)] if columns else [],
    )


def quantize_weight(weight: Tensor, recipe: Recipe, *, columns: bool = True) -> Quantized:
    """weight [O, I] -> the copies that stay (``get_weight_workspace``): one for each direction."""
    count, width = weight.shape
    along, across = _scales(count, width, recipe, weight=True)
    element = 1 if recipe == "mxfp8" else 4  # bytes of a scale
    rows = [weight_copy(weight, [count, width]), weight_copy(weight, [*along[:-1], along[-1] * element])]
    if not columns or read_either_way(recipe):
        return Quantized(recipe, rows, [])
    if recipe in ONE_SCALE:
        return Quantized(recipe, rows, [weight_copy(weight, [width, count]), rows[1]])
    scales = weight_copy(weight, [*across[:-1], across[-1] * element])
    return Quantized(recipe, rows, [weight_copy(weight, [width, count]), scales])


def gather(own: Quantized, group: Any, *, columns: bool) -> Quantized:
    """This rank's rows of all ranks of ``group``, along their rows or, where ``own`` has those alone, their columns."""
    data, scales = own.columns if columns else own.rows
    whole = [part.new_empty(group.size() * part.shape[0], *part.shape[1:]) for part in (data, scales)]
    dist.all_gather_into_tensor(whole[0], data, group=group)
    if own.recipe in ONE_SCALE:
        whole[1] = scales  # one for all ranks
    else:
        dist.all_gather_into_tensor(whole[1], scales, group=group)
    return Quantized(own.recipe, [] if columns else whole, whole if columns else [])


def _scales(count: int, width: int, recipe: Recipe, *, weight: bool) -> tuple[list[int], list[int]]:
    """Shapes of the scales along the rows and along the columns (``get_scale_shape``)."""
    if recipe in ONE_SCALE:
        return [1], [1]
    if recipe == "mxfp8":
        return (
            [_up(count, BLOCK), _up(-(-width // SMALL_BLOCK), 4)],
            [_up(-(-count // SMALL_BLOCK), 4), _up(width, BLOCK)],
        )
    tall, wide = -(-count // BLOCK), -(-width // BLOCK)
    if weight:
        return [tall, _up(wide, 4)], [wide, _up(tall, 4)]
    return [wide, _up(count, 4)], [tall, _up(width, 4)]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _data(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.uint8)


def keep_in_fp8(weight: nn.Parameter) -> None:
    """Let a parameter be in FP8 alone, where such are made: its shape and format stay, its own bytes go."""
    recipe = PARAMETERS.get()
    if recipe is None:
        return
    made = quantize_weight(weight.detach(), recipe)
    made.rows[0] = weight.new_empty(weight.shape, dtype=torch.uint8)
    weight.in_fp8, weight.stored = made, made.rows[0]  # type: ignore[attr-defined]
    # Core makes the master weights of what a parameter was before it was rounded.
    weight.get_high_precision_init_val = lambda: weight  # type: ignore[attr-defined]
    weight.clear_high_precision_init_val = lambda: None  # type: ignore[attr-defined]
    weight.untyped_storage().resize_(0)


def is_in_fp8(tensor: Tensor) -> bool:
    """``fp8_utils.is_float8tensor``."""
    return hasattr(tensor, "in_fp8")


def store_in(weight: Any, data: Tensor) -> None:
    """``fp8_utils.modify_underlying_storage``: the parameter's bytes are those of core's buffer from now on."""
    weight.in_fp8.rows[0] = weight.stored = data


def quantize_shards(weights: Sequence[Any], masters: Sequence[Tensor | None], *rest: Any) -> None:
    """``fp8_utils.quantize_param_shard``: this rank's part of every weight, from its part of the master weight."""
    for weight, master in zip(weights, masters, strict=True):
        if master is not None:
            kernel("memory", [master], [weight.stored])


class Padding(nn.Module):
    """``te.pytorch.Fp8Padding``: the tokens of every expert become a multiple of what its products take."""

    def __init__(self, num_gemms: int) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        """x [P, H], so many rows of each expert -> with rows between them, where any are needed."""
        padded = [_up(count, 32 if AUTOCAST.get() == "mxfp8" else 16) for count in m_splits]
        return (x, m_splits) if padded == m_splits else (Resized.apply(x, sum(padded)), padded)


class Unpadding(Padding):
    """``te.pytorch.Fp8Unpadding``."""

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:  # type: ignore[override]
        """x [P', H] -> the rows that are tokens, as many as ``m_splits`` says."""
        return x if x.shape[0] == sum(m_splits) else Resized.apply(x, sum(m_splits))


class Resized(torch.autograd.Function):
    """Copies the rows that are on both sides; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = x.shape[0]
        out = x.new_empty(count, *x.shape[1:])
        kernel("memory", [x], [out])
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grads = grad_output.new_empty(ctx.count, *grad_output.shape[1:])
        kernel("memory", [grad_output], [grads])
        return grads, None
