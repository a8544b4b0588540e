"""Low-rank adapters beside frozen parallel linear layers (LoRA, arXiv 2106.09685): y = W x + s B A x.

Where tp ranks divide a layer's output rows (queries, keys and values; the MLP's first matrix), B is divided with them
and every rank has A; where they divide its input columns (the two matrices that write into the residual stream), A is
divided and every rank has B. The tensors that are exchanged for it are R wide, not H.

Shapes: S sequence, B batch, R rank, I inputs and O outputs of the layer; /tp what a tp rank has of an axis.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_slm.model.config import ADAPTER_SUFFIX, LoraConfig

ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Layers whose input columns tp ranks divide; of the others they divide the output rows."""

IN_ATTENTION = ("linear_qkv", "linear_proj")


class Adapter(nn.Module):
    """s B A x beside one linear layer, whose output it is added to by a hook.

    It stands beside the layer in the module that holds both: core's layers know their own parameters alone.

    Args:
        target: name of the layer.
        linear: the layer, whose weight is [O/tp, I] or [O, I/tp].
    """

    def __init__(self, target: str, linear: Any, lora: LoraConfig, config: TransformerConfig, group: Any) -> None:
        super().__init__()
        self.enabled = True
        self.scale, self._dropout = lora.scale, lora.lora_dropout
        self._row, self._group = target in ROW_PARALLEL, group
        self._sequence_parallel = config.sequence_parallel
        self._gated = config.gated_linear_unit and target == "linear_fc1"
        rows, columns = linear.weight.shape
        like = {"dtype": config.params_dtype, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.zeros(lora.lora_rank, columns, **like))
        self.lora_b = nn.Parameter(torch.zeros(rows, lora.lora_rank, **like))
        divided, whole = (self.lora_a, self.lora_b) if self._row else (self.lora_b, self.lora_a)
        set_tensor_model_parallel_attributes(divided, is_parallel=True, dim=int(self._row), stride=1)
        # Each rank has multiplied its own tokens: core adds such a gradient up over tp, as it does for norms.
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added to the output: inputs [S(/tp), B, I] -> [S, B, O/tp], or [S, B, I/tp] -> [S(/tp), B, O]."""
        low = F.linear(self._dropped(inputs), self.lora_a)
        if self._row and self._sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self._group)
        elif self._row:
            low = reduce_from_tensor_model_parallel_region(low, group=self._group)
        elif self._sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self._group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self._group)
        return F.linear(low * self.scale, self.lora_b)

    def _dropped(self, inputs: Tensor) -> Tensor:
        if not self.training or not self._dropout:
            return inputs
        # Without sequence parallelism ranks draw alike, but here each has other columns. With it core's transformer
        # block has changed to the stream of the rank already.
        own = self._row and not self._sequence_parallel
        with get_cuda_rng_tracker().fork() if own else contextlib.nullcontext():
            return F.dropout(inputs, self._dropout)

    def add_to(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Any, Any]) -> tuple[Tensor, Any]:
        """A forward hook of the layer, which returns (output, bias).

        Transformer Engine's layers with a norm in front hand the normed input on as well: ((output, normed), None).
        """
        result, bias = output
        normed = inputs[0]
        if isinstance(result, tuple):
            result, normed = result
        return (result + self(normed) if self.enabled else result), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Both matrices, cut as the layer's weight is; the halves of a gated MLP each for itself."""
        known: Any = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"lora_a": 1} if self._row else {"lora_b": 0},
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=known["dp_cp_group"],
        )
        if self._gated:
            name = f"{prefix}lora_b"
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


def add_adapters(chunk: Any, lora: LoraConfig, config: TransformerConfig, groups: Any) -> None:
    """Freeze a model chunk and put adapters beside its linear layers. A head that gives a number is trained as it is.

    To be called before the weights are initialised: adapters have global names as every parameter does.
    """
    chunk.requires_grad_(requires_grad=False)
    for layer in chunk.decoder.layers:
        for target in lora.lora_targets:
            holder = layer.self_attention if target in IN_ATTENTION else layer.mlp
            linear = getattr(holder, target)
            if hasattr(linear, "return_layernorm_output"):  # of Transformer Engine: the norm is part of the layer
                linear.return_layernorm_output = True
            adapter = Adapter(target, linear, lora, config, groups.tp)
            holder.add_module(target + ADAPTER_SUFFIX, adapter)
            linear.register_forward_hook(adapter.add_to)
    if (head := getattr(chunk, "value_head", None)) is not None:
        head.requires_grad_(requires_grad=True)
    if chunk.pre_process:
        chunk.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Recomputation gives its output a gradient where its input has one, and a frozen embedding gives none."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def initial_adapter_deviation(name: str, inputs: dict[str, int]) -> float | None:
    """Standard deviation of an A by its global name; None for a B, which begins with zeros, and for every other name.

    It is that of PEFT's Kaiming initialisation, 1 / sqrt(3 I).

    Args:
        inputs: I of each layer, over all tp ranks.
    """
    if not name.endswith(f"{ADAPTER_SUFFIX}.lora_a"):
        return None
    return 1.0 / math.sqrt(3.0 * inputs[name.split(".")[-2].removesuffix(ADAPTER_SUFFIX)])


@contextlib.contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """For a while the chunks, wrapped or not, are the model that the adapters were put into."""
    adapters = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
