"""Transformer Engine's linear layers in the dry world: what they keep for the backward pass, and what they allocate.

Read from NVIDIA/TransformerEngine v2.11, ``transformer_engine/pytorch/module/{linear,layernorm_linear,base}.py`` and
``cpp_extensions/gemm.py``; the classes of core's ``extensions/transformer_engine.py`` are built on these. In bf16 and
without overlap of communication by user buffers.

Shapes: T tokens of this rank (of all tp ranks where a linear has gathered them), I inputs, O outputs of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.parallel.declared_norm import Module, norm_backward, norm_forward
from megatron_slm.parallel.declared_ops import (
    accumulate_weight_gradient,
    gather_rows,
    matmul,
    matmul_transposed,
    scatter_rows,
    workspace,
)


class Exchange(NamedTuple):
    """How a linear is divided.

    Attributes:
        mode: "column" (outputs over tp ranks), "row" (inputs) or None.
        sequence_parallel: tokens are divided outside of the linear.
        group: tp group; None where the linear exchanges nothing.
        accumulate: weight gradients are added to ``main_grad`` by the matrix product itself.
    """

    mode: str | None
    sequence_parallel: bool
    group: Any
    accumulate: bool

    @property
    def divided(self) -> bool:
        """Whether anything is exchanged."""
        return self.mode is not None and self.group is not None and self.group.size() > 1


class Linear(Module):
    """``te.pytorch.Linear``: ``weight`` [O, I] and, if asked for, ``bias`` [O]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features //= tp_size
        elif parallel_mode == "row":
            self.in_features //= tp_size
        self.use_bias, self.return_bias = bias, return_bias
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.save_original_input = False
        self.exchange = Exchange(
            parallel_mode, sequence_parallel and tp_size > 1, tp_group if tp_size > 1 else None, fuse_wgrad_accumulation
        )
        self._add_norm(params_dtype)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        mark_divided(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias: Tensor | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=params_dtype))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.exchange.sequence_parallel  # type: ignore[attr-defined]
            else:
                mark_divided(self.bias, 0)

    def _add_norm(self, dtype: torch.dtype | None) -> None:
        """A plain linear has none."""

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """x [..., I] -> [..., O], along the first dimension as the exchange divides it; with ``return_bias`` a pair."""
        added = None if self.return_bias else self.bias
        out = self._apply_to(x, added)
        return (out, self.bias) if self.return_bias else out

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = LinearFunction.apply(x, self.weight, bias, self.exchange)
        return out


class LayerNormLinear(Linear):
    """``te.pytorch.LayerNormLinear``: the norm's parameters beside the linear's."""

    def __init__(self, *args: Any, normalization: str = "LayerNorm", **kwargs: Any) -> None:
        self.normalization = normalization
        super().__init__(*args, **kwargs)

    def _add_norm(self, dtype: torch.dtype | None) -> None:
        parallel = self.exchange.sequence_parallel
        self.layer_norm_weight = nn.Parameter(torch.empty(self.in_features, dtype=dtype))
        self.layer_norm_weight.sequence_parallel = parallel  # type: ignore[attr-defined]
        self.layer_norm_bias: Tensor | None = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(self.in_features, dtype=dtype))
            self.layer_norm_bias.sequence_parallel = parallel  # type: ignore[attr-defined]

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = LayerNormLinearFunction.apply(
            x, self.layer_norm_weight, self.layer_norm_bias, self.weight, bias, self.exchange
        )
        return out


class LinearFunction(torch.autograd.Function):
    """Keeps its input (this rank's part) and the weight.

    Forward: gathered input (column, sequence parallel), output, scattered output (row, sequence parallel). Backward:
    gathered gradient (row) or gathered input (column), gradient of the gathered input and its scattered part, all of
    them until the weight gradient, which goes into ``main_grad`` without a tensor of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.exchange = exchange
        out = project(x.reshape(-1, x.shape[-1]), weight, exchange)
        return out.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        grads = whole_gradient(grad_output, exchange)
        rows = whole_input(x.reshape(-1, x.shape[-1]), exchange)
        whole = matmul_transposed(grads, weight) if ctx.needs_input_grad[0] else None
        part = None if whole is None else reduced(whole, exchange)
        grad_weight, grad_bias = weight_gradients(grads, rows, weight, bias, exchange)
        return None if part is None else part.view(x.shape), grad_weight, grad_bias, None


class LayerNormLinearFunction(torch.autograd.Function):
    """Keeps its input, its normalised input (both this rank's part), the statistics of the norm and the weights.

    Forward: normalised input, statistics, gathered normalised input, output. Backward: as a column-parallel linear,
    then the gradient of the norm's input while the gradient of its gathered output is still referred to.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  the signature is autograd's
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        exchange: Exchange,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        normalised, statistics = norm_forward(rows, norm_weight, norm_bias)
        out = project(normalised, weight, exchange)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, *statistics)
        # Beside the others: it is released before the norm's own gradient is computed.
        ctx.normalised = normalised if any(ctx.needs_input_grad) else None
        ctx.exchange = exchange
        return out.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, norm_weight, norm_bias, weight, bias, *statistics = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        grads = whole_gradient(grad_output, exchange)
        normalised, ctx.normalised = ctx.normalised, None
        rows = whole_input(normalised, exchange)
        whole = matmul_transposed(grads, weight)
        part = reduced(whole, exchange)
        grad_weight, grad_bias = weight_gradients(grads, rows, weight, bias, exchange)
        del rows, normalised
        grad_x, grad_norm, grad_norm_bias = norm_backward(
            part, x.reshape(-1, x.shape[-1]), statistics, norm_weight, norm_bias
        )
        return grad_x.view(x.shape), grad_norm, grad_norm_bias, grad_weight, grad_bias, None


def project(rows: Tensor, weight: Tensor, exchange: Exchange) -> Tensor:
    """rows [T, I] and weight [O, I] -> [T', O], with the exchange in front of (column) or behind (row) the product."""
    workspace(rows)
    if exchange.mode == "column" and exchange.sequence_parallel:
        rows = gather_rows(rows, exchange.group)
    out = matmul(rows, weight)
    del rows
    return summed(out, exchange)


def summed(out: Tensor, exchange: Exchange) -> Tensor:
    """Behind a row-parallel product [T, O]: the sum over its group, or this rank's rows of it; else as it is."""
    if exchange.mode == "row" and exchange.divided:
        if exchange.sequence_parallel:
            return scatter_rows(out, exchange.group)
        dist.all_reduce(out, group=exchange.group)
    return out


def whole_gradient(grad_output: Tensor, exchange: Exchange) -> Tensor:
    """The output's gradient [T, O] of all tokens the weight saw."""
    grads = grad_output.reshape(-1, grad_output.shape[-1]).contiguous()
    return gather_rows(grads, exchange.group) if exchange.mode == "row" and exchange.sequence_parallel else grads


def whole_input(rows: Tensor, exchange: Exchange) -> Tensor:
    """The input [T, I] of all tokens the weight saw, once more."""
    return gather_rows(rows, exchange.group) if exchange.mode == "column" and exchange.sequence_parallel else rows


def reduced(whole: Tensor, exchange: Exchange) -> Tensor:
    """The input's gradient as this rank's input was; the caller still holds ``whole``, as the exchange does."""
    if exchange.mode != "column" or not exchange.divided:
        return whole
    if exchange.sequence_parallel:
        return scatter_rows(whole, exchange.group)
    dist.all_reduce(whole, group=exchange.group)
    return whole


def weight_gradients(
    grads: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, exchange: Exchange
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from grads [T, O] and rows [T, I]."""
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    return accumulate_weight_gradient(grads, rows, weight, accumulate=exchange.accumulate), grad_bias


def mark_divided(parameter: Tensor, dimension: int) -> None:
    """The marks that core's layers and Transformer Engine's put on what tp ranks divide."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dimension  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
