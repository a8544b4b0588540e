"""Transformer Engine's linear layers under FP8 in the dry world.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/module/{linear,layernorm_linear,grouped_linear,base}.py`` and
``pytorch/csrc/extensions/normalization.cpp``. Without a recipe in force they are those of ``declared_linear`` and
``declared_experts``. Shapes as there.

What differs from bf16: weights are copied by the first micro-batch, and the copies stay; inputs and gradients are
copied before their products, and exchanged so where they are gathered; what is saved of an input is the copy that the
weight's gradient reads, or the rows that are gathered again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.parallel import declared_experts, declared_linear
from megatron_slm.parallel.declared_fp8 import (
    AUTOCAST,
    ONE_SCALE,
    Quantized,
    Recipe,
    gather,
    gathers_rows,
    is_in_fp8,
    keep_in_fp8,
    quantize,
    quantize_weight,
)
from megatron_slm.parallel.declared_linear import Exchange, reduced, summed
from megatron_slm.parallel.declared_norm import norm_backward
from megatron_slm.parallel.declared_ops import dummy_gradient, kernel, workspace


class Call(NamedTuple):
    """One forward pass of a linear.

    Attributes:
        copies: of the weight.
        keeps: a backward pass follows.
        original: the input is saved as it came (``save_original_input``).
    """

    recipe: Recipe
    exchange: Exchange
    copies: Quantized
    keeps: bool
    original: bool

    @property
    def gathered(self) -> bool:
        """Whether the input is gathered over tp."""
        return self.exchange.mode == "column" and self.exchange.sequence_parallel


class Copies:
    """The FP8 copies that a module keeps of its weights, by the weight's name."""

    def __init__(self) -> None:
        self._kept: dict[str, Quantized] = {}

    def of(self, name: str, weight: Tensor, recipe: Recipe, *, cached: bool) -> Quantized:
        """``get_weight_workspace``; without a cache they are made every time, but for a parameter in FP8."""
        if is_in_fp8(weight):
            own: Quantized = weight.in_fp8  # type: ignore[attr-defined]
            return own
        if name in self._kept and cached:
            return self._kept[name]
        made = quantize_weight(weight.detach(), recipe)
        if cached:
            self._kept[name] = made
        return made


class Linear(declared_linear.Linear):
    """``te.pytorch.Linear``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        keep_in_fp8(self.weight)
        self.copies, self._cached = Copies(), True

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """As without FP8."""
        self._cached = is_first_microbatch is not None
        return super().forward(x, is_first_microbatch)

    def call(self, recipe: Recipe) -> Call:
        """What this pass does."""
        copies = self.copies.of("weight", self.weight, recipe, cached=self._cached)
        return Call(recipe, self.exchange, copies, torch.is_grad_enabled(), self.save_original_input)

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        recipe = AUTOCAST.get()
        if recipe is None:
            return super()._apply_to(x, bias)
        out: Tensor = LinearFunction.apply(x, self.weight, bias, self.call(recipe))
        return out


class LayerNormLinear(Linear, declared_linear.LayerNormLinear):
    """``te.pytorch.LayerNormLinear``."""

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        recipe = AUTOCAST.get()
        if recipe is None:
            return declared_linear.LayerNormLinear._apply_to(self, x, bias)
        out: Tensor = LayerNormLinearFunction.apply(
            x, self.layer_norm_weight, self.layer_norm_bias, self.weight, bias, self.call(recipe)
        )
        return out


class GroupedLinear(declared_experts.GroupedLinear):
    """``te.pytorch.GroupedLinear``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for index in range(self.num_gemms):
            keep_in_fp8(getattr(self, f"weight{index}"))
        self.copies = Copies()

    def forward(self, x: Tensor, m_splits: Any = None, is_first_microbatch: bool | None = None) -> Any:
        """As without FP8."""
        recipe = AUTOCAST.get()
        if recipe is None:
            return super().forward(x, m_splits, is_first_microbatch)
        names = [f"weight{index}" for index in range(self.num_gemms)]
        weights = [getattr(self, name) for name in names]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else []
        cached = is_first_microbatch is not None
        copies = [
            self.copies.of(name, weight, recipe, cached=cached) for name, weight in zip(names, weights, strict=True)
        ]
        call = GroupedCall(recipe, self.accumulate, copies, torch.is_grad_enabled(), self.save_original_input)
        out = GroupedLinearFunction.apply(x, call, *weights, *biases)
        return (out, biases) if self.return_bias else out


class LinearFunction(torch.autograd.Function):
    """Keeps an FP8 copy of its input (this rank's part), or the input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        columns = call.keeps and not call.original and not (call.gathered and gathers_rows(call.recipe))
        own = quantize(x.reshape(-1, x.shape[-1]), call.recipe, columns=columns)
        out = project(own, x, call)
        if columns:
            own.keep_columns()
        ctx.save_for_backward(weight, bias, *([x] if call.original else []))
        ctx.kept = own if call.keeps and not call.original else None
        ctx.call, ctx.shape = call, x.shape
        return out.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        weight, bias, *original = ctx.saved_tensors
        call, own = ctx.call, ctx.kept
        ctx.kept = None
        grads = whole_gradient(grad_output, call)
        if original:
            own = _copied_again(original[0].reshape(-1, original[0].shape[-1]), call)
        whole = whole_input(own, call)
        part = _input_gradient(grads, grad_output, ctx.shape, call) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grads, whole, weight, accumulate=call.exchange.accumulate)
        grad_bias = None if bias is None else bias.new_empty(bias.shape)
        return None if part is None else part.view(ctx.shape), grad_weight, grad_bias, None


class LayerNormLinearFunction(torch.autograd.Function):
    """Keeps its input, the FP8 copy of its normalised input (both this rank's part) and the statistics of the norm."""

    @staticmethod
    def forward(  # noqa: PLR0913  the signature is autograd's
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        columns = call.keeps and not (call.gathered and gathers_rows(call.recipe))
        own, statistics = _normalised(rows, norm_weight, norm_bias, call.recipe, columns=columns)
        out = project(own, x, call)
        if columns:
            own.keep_columns()
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, *statistics)
        ctx.kept = own if call.keeps else None
        ctx.call = call
        return out.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, norm_weight, norm_bias, weight, bias, *statistics = ctx.saved_tensors
        call, own = ctx.call, ctx.kept
        ctx.kept = None
        grads = whole_gradient(grad_output, call)
        whole = whole_input(own, call)
        part = _input_gradient(grads, grad_output, x.shape, call)
        grad_weight = weight_gradient(grads, whole, weight, accumulate=call.exchange.accumulate)
        grad_bias = None if bias is None else bias.new_empty(bias.shape)
        del grads, own, whole
        rows = x.reshape(-1, x.shape[-1])
        grad_x, grad_norm, grad_norm_bias = norm_backward(part, rows, statistics, norm_weight, norm_bias)
        return grad_x.view(x.shape), grad_norm, grad_norm_bias, grad_weight, grad_bias, None


class GroupedCall(NamedTuple):
    """As :class:`Call`, of experts: they exchange nothing."""

    recipe: Recipe
    accumulate: bool
    copies: list[Quantized]
    keeps: bool
    original: bool


class GroupedLinearFunction(torch.autograd.Function):
    """Keeps the FP8 copies of its experts' inputs, or the input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: GroupedCall, *weights_and_biases: Tensor) -> Tensor:
        experts = len(call.copies)
        weights = weights_and_biases[:experts]
        workspace(x, grouped=True)
        rows = x.reshape(-1, x.shape[-1])
        columns = call.keeps and not call.original
        own = quantize(rows, call.recipe, columns=columns)
        out = rows.new_empty(rows.shape[0], weights[0].shape[0])
        kernel("gemm", [*own.rows, *(copy.rows[0] for copy in call.copies)], [out], 2 * rows.numel() * out.shape[1])
        if columns:
            own.keep_columns()
        ctx.save_for_backward(*weights_and_biases, *([x] if call.original else []))
        ctx.kept = own if columns else None
        ctx.call, ctx.shape = call, x.shape
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        call, own, experts = ctx.call, ctx.kept, len(ctx.call.copies)
        ctx.kept = None
        saved = list(ctx.saved_tensors)
        original = saved.pop() if call.original else None
        weights, biases = saved[:experts], saved[experts:]
        rows = grad_output.contiguous().view(-1, grad_output.shape[-1])
        grads = quantize(rows, call.recipe)
        grad_rows = rows.new_empty(rows.shape[0], weights[0].shape[1])
        flops = 2 * rows.numel() * weights[0].shape[1]
        copies = [_across(copy) for copy in call.copies]
        kernel("gemm", [*grads.rows, *copies], [grad_rows], flops)
        if original is not None:
            own = quantize(original.reshape(-1, original.shape[-1]), call.recipe, rows=call.recipe in ONE_SCALE)
        grad_weights = [
            weight_gradient(grads, own, weight, accumulate=call.accumulate, share=experts) for weight in weights
        ]
        grad_biases = [bias.new_empty(bias.shape) for bias in biases]
        return grad_rows.view(ctx.shape), None, *grad_weights, *grad_biases


def project(own: Quantized, x: Tensor, call: Call) -> Tensor:
    """The copies of x's rows [T, I] and of the weight [O, I] -> [T', O] in bf16, with the exchange around it."""
    exchange = call.exchange
    workspace(x)
    whole = gather(own, exchange.group, columns=False) if call.gathered else own
    out = x.new_empty(whole.rows[0].shape[0], call.copies.rows[0].shape[0])
    kernel("gemm", [*whole.rows, *call.copies.rows], [out], 2 * out.numel() * call.copies.rows[0].shape[1])
    del whole
    return summed(out, exchange)


def whole_gradient(grad_output: Tensor, call: Call) -> Quantized:
    """Both copies of the output's gradient [T, O] of all tokens the weight saw (``grad_output_preprocess``)."""
    grads, exchange = grad_output.reshape(-1, grad_output.shape[-1]).contiguous(), call.exchange
    if exchange.mode != "row" or not exchange.sequence_parallel:
        return quantize(grads, call.recipe)
    if gathers_rows(call.recipe):
        whole = gather(quantize(grads, call.recipe, columns=False), exchange.group, columns=False)
        whole.transpose()
        return whole
    own = quantize(grads, call.recipe)
    along, across = (gather(own, exchange.group, columns=columns) for columns in (False, True))
    return Quantized(call.recipe, along.rows, across.columns)


def whole_input(own: Quantized, call: Call) -> Quantized:
    """What the weight's gradient reads of the input, of all tokens the weight saw."""
    if not call.gathered:
        return own
    whole = gather(own, call.exchange.group, columns=not gathers_rows(call.recipe))
    if gathers_rows(call.recipe):
        whole.transpose()
    return whole


def weight_gradient(
    grads: Quantized, rows: Quantized, weight: Tensor, *, accumulate: bool, share: int = 1
) -> Tensor | None:
    """``declared_ops.accumulate_weight_gradient`` from FP8 copies, of which one in ``share`` rows are this weight's."""
    read = [_across(grads), _across(rows)]
    flops = 2 * read[0].numel() * weight.shape[1] // share
    if not accumulate:
        made = weight.new_empty(weight.shape)
        kernel("gemm", read, [made], flops)
        return made
    kernel("gemm", read, [weight.main_grad], flops)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return dummy_gradient(list(weight.shape), weight.dtype)


def _across(copies: Quantized) -> Tensor:
    """The data that a product along the columns reads."""
    return (copies.columns or copies.rows)[0]


def _input_gradient(grads: Quantized, like: Tensor, shape: torch.Size, call: Call) -> Tensor:
    """The gradient of the input as this rank's input was."""
    data = grads.rows[0]
    whole = like.new_empty(data.shape[0], shape[-1])
    kernel("gemm", [data, _across(call.copies)], [whole], 2 * data.numel() * shape[-1])
    return reduced(whole, call.exchange)


def _copied_again(rows: Tensor, call: Call) -> Quantized:
    """The FP8 copy of an input that was saved as it came."""
    if call.recipe in ONE_SCALE:
        return quantize(rows, call.recipe, columns=not call.gathered)
    return quantize(rows, call.recipe, rows=False)


def _normalised(
    rows: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, *, columns: bool
) -> tuple[Quantized, list[Tensor]]:
    """The norm of rows [T, I] in FP8, and its statistics. Delayed scaling alone knows the scale beforehand."""
    statistics = [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(1 if bias is None else 2)]
    if recipe == "delayed":
        made = quantize(rows, recipe, columns=columns)
        return made, statistics
    out = torch.empty_like(rows)
    kernel("memory", [rows, weight], [out, *statistics])
    return quantize(out, recipe, columns=columns), statistics
