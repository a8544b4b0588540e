"""Transformer Engine's grouped linear and its permutations of tokens in the dry world.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/module/grouped_linear.py``, ``pytorch/permutation.py`` and
``pytorch/triton/permutation.py``.

Shapes: T tokens of this rank, P tokens after the choice of experts, E experts, H channels, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.parallel.declared_linear import mark_divided
from megatron_slm.parallel.declared_norm import Module
from megatron_slm.parallel.declared_ops import accumulate_weight_gradient, kernel, workspace


class GroupedLinear(Module):
    """``te.pytorch.GroupedLinear``: ``weight0`` ... [O, I] and, if asked for, ``bias0`` ... [O]."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias = bias, return_bias
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.accumulate = fuse_wgrad_accumulation
        self.save_original_input = False
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
            mark_divided(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                added = nn.Parameter(torch.empty(self.out_features, dtype=params_dtype))
                self.register_parameter(f"bias{index}", added)

    def forward(self, x: Tensor, m_splits: Any = None, is_first_microbatch: bool | None = None) -> Any:
        """x [P, I], the tokens of one expert behind those of another -> [P, O]."""
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else []
        out = GroupedLinearFunction.apply(x, self.accumulate, self.num_gemms, *weights, *biases)
        return (out, biases) if self.return_bias else out


class GroupedLinearFunction(torch.autograd.Function):
    """Keeps its input and the weights. Forward: the output. Backward: the input's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, accumulate: bool, experts: int, *weights_and_biases: Tensor) -> Tensor:
        weights = weights_and_biases[:experts]
        workspace(x, grouped=True)
        ctx.save_for_backward(x, *weights_and_biases)
        ctx.accumulate, ctx.experts = accumulate, experts
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], weights[0].shape[0])
        kernel("gemm", [rows, *weights], [out], 2 * rows.numel() * out.shape[1])
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, *weights_and_biases = ctx.saved_tensors
        weights, biases = weights_and_biases[: ctx.experts], weights_and_biases[ctx.experts :]
        grads = grad_output.contiguous().view(-1, grad_output.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        grad_rows = torch.empty_like(rows)
        kernel("gemm", [grads, *weights], [grad_rows], 2 * rows.numel() * grads.shape[1])
        # One product for all experts; how many tokens each has changes neither its bytes nor its operations.
        shares = zip(grads.tensor_split(ctx.experts), rows.tensor_split(ctx.experts), weights, strict=True)
        grad_weights = [
            accumulate_weight_gradient(grad, part, weight, accumulate=ctx.accumulate) for grad, part, weight in shares
        ]
        grad_biases = [bias.new_empty(bias.shape) for bias in biases]
        return grad_rows.view(x.shape), None, None, *grad_weights, *grad_biases


class Permutation(torch.autograd.Function):
    """``_moe_permute_mask_map``: keeps the map of rows [T, 2 E + 1] in int32. Weights go along."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, chosen: Tensor, count: int) -> Any:
        row_map = row_id_map(chosen, x)
        out = x.new_empty(count, x.shape[1])
        sent = None if weights is None else weights.new_empty(count)
        kernel("memory", [x, row_map], [out])
        ctx.save_for_backward(row_map)
        ctx.shape, ctx.experts = x.shape, chosen.shape[1]
        return out, row_map, sent

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_map: Any, grad_sent: Tensor | None) -> Any:
        (row_map,) = ctx.saved_tensors
        grad_x = grad_output.new_empty(ctx.shape)
        grad_weights = None if grad_sent is None else grad_sent.new_empty(ctx.shape[0], ctx.experts)
        kernel("memory", [grad_output, row_map], [grad_x])
        return grad_x, grad_weights, None, None


class Restoration(torch.autograd.Function):
    """``_moe_unpermute_mask_map``: keeps the map of rows; with weights its input and the weights too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, row_map: Tensor, shape: torch.Size) -> Tensor:
        out = x.new_empty(shape)
        kernel("memory", [x, row_map], [out])
        ctx.save_for_backward(row_map, *([] if weights is None else [x, weights]))
        ctx.rows = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        row_map, *weighted = ctx.saved_tensors
        grad_x = grad_output.new_empty(ctx.rows)
        grad_weights = torch.empty_like(weighted[1]) if weighted else None
        kernel("memory", [grad_output, row_map, *weighted], [grad_x])
        return grad_x, grad_weights, None, None


class Sorting(torch.autograd.Function):
    """``_moe_chunk_sort``: keeps the map of rows [P] in int32. Weights go along."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None) -> Any:
        row_map = x.new_empty(x.shape[0], dtype=torch.int32)
        out = torch.empty_like(x)
        sent = None if weights is None else torch.empty_like(weights)
        kernel("memory", [x, row_map], [out])
        ctx.save_for_backward(row_map)
        return out, sent

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_sent: Tensor | None) -> Any:
        (row_map,) = ctx.saved_tensors
        grad_x = torch.empty_like(grad_output)
        kernel("memory", [grad_output, row_map], [grad_x])
        return grad_x, None if grad_sent is None else torch.empty_like(grad_sent)


def te_general_gemm(
    a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, layout: str = "TN", **ignored: Any
) -> list[Tensor]:
    """``general_gemm`` by core's name, which the router multiplies with; ``layout`` says how a and b are transposed."""
    rows, columns = {
        "TN": (b.shape[0], a.shape[0]),
        "NN": (b.shape[0], a.shape[1]),
        "NT": (b.shape[1], a.shape[1]),
    }[layout]
    workspace(b)
    out = b.new_empty(rows, columns, dtype=out_dtype or b.dtype)
    kernel("gemm", [a, b], [out], 2 * a.numel() * b.numel() // (b.shape[0] if layout == "NT" else b.shape[1]))
    return [out]


def row_id_map(chosen: Tensor, like: Tensor) -> Tensor:
    """Where the row of a token and expert goes, [T, 2 E + 1]; how it is sorted is forgotten at once."""
    tokens, experts = chosen.shape
    row_map = like.new_empty(tokens, 2 * experts + 1, dtype=torch.int32)
    kernel("memory", [], [row_map])
    return row_map


def fused_permute(x: Tensor, chosen: Tensor, num_out_tokens: int = -1, **ignored: Any) -> tuple[Tensor, Tensor]:
    """``moe_permute``: x [T, H] and choice [T, E] -> [P, H] and the map of rows."""
    out, row_map, _ = Permutation.apply(x, None, chosen, int(num_out_tokens))
    return out, row_map


def fused_permute_with_probs(
    x: Tensor, weights: Tensor, chosen: Tensor, num_out_tokens: int = -1, **ignored: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``moe_permute_with_probs``: also weights [T, E] -> [P]."""
    out, row_map, sent = Permutation.apply(x, weights, chosen, int(num_out_tokens))
    return out, sent, row_map


def fused_unpermute(
    x: Tensor, row_map: Tensor, merging_probs: Tensor | None = None, restore_shape: Any = None, **ignored: Any
) -> Tensor:
    """``moe_unpermute``: x [P, H] -> [T, H]."""
    out: Tensor = Restoration.apply(x, merging_probs, row_map, restore_shape)
    return out


def fused_sort_chunks_by_index(x: Tensor, split_sizes: Any, sorted_index: Any) -> Tensor:
    """``moe_sort_chunks_by_index``: rows [P, H] in another order."""
    out: Tensor = Sorting.apply(x, None)[0]
    return out


def fused_sort_chunks_by_index_with_probs(
    x: Tensor, probs: Tensor, split_sizes: Any, sorted_index: Any
) -> tuple[Tensor, Tensor]:
    """``moe_sort_chunks_by_index_with_probs``."""
    out, sent = Sorting.apply(x, probs)
    return out, sent
