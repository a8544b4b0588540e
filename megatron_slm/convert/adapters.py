"""The adapters of a checkpoint: which there are, layer by layer, and what they do to a weight (``parallel/lora.py``).

A checkpoint holds them beside the weights, stacked as these are: ``decoder.layers.mlp.linear_fc1_adapter.lora_a``
[layers, R, I] and ``.lora_b`` [layers, O, R] beside ``decoder.layers.mlp.linear_fc1.weight`` [layers, O, I].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ADAPTER_SUFFIX
from megatron_slm.train.checkpoint import has_adapters
from megatron_slm.train.payload_index import PayloadIndex, is_weight, read_index
from megatron_slm.train.payload_stream import BlockReader

FACTORS = (f"{ADAPTER_SUFFIX}.lora_a", f"{ADAPTER_SUFFIX}.lora_b")
WEIGHT = ".weight"


class StoredAdapters:
    """The adapters of the checkpoint in ``path``.

    Attributes:
        index: of the whole checkpoint.
        weights: names of the weights that have one, in order.

    Raises:
        CheckpointError: it has none, or one without its weight.
    """

    def __init__(self, path: Path) -> None:
        self.index: PayloadIndex = read_index(path)
        if not has_adapters(self.index.tensors):
            raise CheckpointError(
                f"{path} has no adapters (its run had lora.lora_rank=0); there is nothing to take out"
            )
        self.reader = BlockReader(path, self.index)
        own = [name for name in self.index.tensors if is_weight(name)]
        self.weights = sorted({name.partition(ADAPTER_SUFFIX)[0] + WEIGHT for name in own if ADAPTER_SUFFIX in name})
        needed = [*self.weights, *(name for weight in self.weights for name in factors_of(weight))]
        if missing := [name for name in needed if name not in self.index.tensors]:
            raise CheckpointError(
                f"{path} has no tensor {missing[0]}, which an adapter needs; choose another checkpoint"
            )

    def factors(self, weight: str, layer: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of one layer of a weight; ``layer`` is empty where layers are not stacked."""
        first, second = (self.matrix(name, layer) for name in factors_of(weight))
        return first, second

    def matrix(self, name: str, layer: tuple[int, ...]) -> Tensor:
        """One layer of a stacked tensor of matrices, or the matrix itself."""
        shape = self.index.tensors[name].shape
        offsets, sizes = (*layer, 0, 0), (*(1 for _ in layer), *shape[-2:])
        return self.reader.block(name, offsets, sizes).view(shape[-2:])

    def layers(self, weight: str) -> list[tuple[int, ...]]:
        """The places of a weight's layers."""
        shape = self.index.tensors[weight].shape
        return [(number,) for number in range(shape[0])] if len(shape) == 3 else [()]


def factors_of(weight: str) -> tuple[str, str]:
    """Names of A and B beside a weight."""
    return weight.removesuffix(WEIGHT) + FACTORS[0], weight.removesuffix(WEIGHT) + FACTORS[1]


def merged(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """W + s B A [O, I], rounded once to the format of W."""
    added = torch.matmul(second.double(), first.double()).mul_(scale)
    return added.add_(weight).to(weight.dtype)
