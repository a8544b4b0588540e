"""How the ranks of a layout cut the tensors of a checkpoint, and which of them writes what. Arithmetic, no torch.

A tensor's name says it: core's column-parallel weights are divided over tp along their first axis, row-parallel ones
along their second, layers over pipeline stages and experts over ep along axes in front of those. What the names do not
tell is one piece, written by a rank that holds it: where it lies changes nothing of what is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.parallel.layout import Coordinates, Layout, chunk_layers

ROOTS = ("embedding", "decoder", "output_layer", "value_head", "mtp")
"""How the names of the model's own tensors begin, in core's GPTModel and in a model that ends with a number."""

COLUMN = frozenset(
    ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1", "eh_proj", "linear_q_proj", "linear_q_up_proj",
     "linear_q_down_proj", "linear_kv_up_proj", "linear_kv_down_proj")
)  # fmt: skip
"""Modules whose outputs tp ranks divide: the first axis of weight and bias."""

ROW = frozenset(("linear_proj", "linear_fc2"))
"""Modules whose inputs tp ranks divide: the second axis of the weight. The bias is whole."""


class Piece(NamedTuple):
    """A box of a tensor (where it begins on every axis, its shape), and the rank that writes it."""

    rank: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Name(NamedTuple):
    """What a tensor's name says: where in the model it is, its module's and its own name, what is stacked in front."""

    root: str
    layer: int | None
    module: str
    leaf: str
    stacked_layers: bool
    stacked_experts: bool

    @property
    def stacked(self) -> int:
        """Axes in front of the tensor's own."""
        return self.stacked_layers + self.stacked_experts


@dataclass(frozen=True)
class Partition:
    """The cuts of one layout.

    Attributes:
        layout: degrees.
        split: layers of every chunk (``layout.split_layers``).
        gated: the MLP's first matrix holds gate and up halves, which are divided each for itself.
    """

    layout: Layout
    split: Sequence[Sequence[int]]
    gated: bool

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """The pieces of a tensor; together they are the tensor.

        Args:
            name: in the checkpoint: a weight's, or that behind a prefix (``ema.``, ``optimizer.state.param.``).
            shape: global.
        """
        said = _read(name)
        whole, own = shape[: said.stacked], shape[said.stacked :]
        tp = self.layout.expert_tp_size if said.stacked_experts else self.layout.tensor_model_parallel_size
        axis, cuts = _axis(said), tp * (2 if self.gated and said.module == "linear_fc1" else 1)
        if axis is None or axis >= len(own) or own[axis] % cuts:
            axis, cuts = 0, 1
        for place in itertools.product(*map(range, whole)):
            for cut in range(cuts):
                sizes = tuple(size // cuts if number == axis else size for number, size in enumerate(own))
                offsets = tuple(cut * size if number == axis else 0 for number, size in enumerate(sizes))
                yield Piece(self._rank(said, place, whole, cut % tp), (*place, *offsets), (*(1 for _ in place), *sizes))

    def object_rank(self, name: str) -> int:
        """The rank that writes an object, ``NAME/shard_OFFSETS_SIZES``, as core names a layer's extra state."""
        key, _, shard = name.partition("/shard_")
        said = _read(key)
        place, whole = (
            tuple(int(number) for number in numbers.split(".") if number.isdigit())[: said.stacked]
            for numbers in (shard.partition("_")[0], shard.partition("_")[2])
        )
        return self._rank(said, place, whole, 0)

    def _rank(self, said: _Name, place: tuple[int, ...], whole: tuple[int, ...], tp: int) -> int:
        """The first of the ranks that hold the piece at ``place`` of the stacked axes, which are ``whole``."""
        layer = place[0] if said.stacked_layers and place else said.layer
        stage = self._stage(said, layer)
        if not said.stacked_experts or not place:
            return self.layout.rank_at(Coordinates(tp=tp, cp=0, dp=0, pp=stage))
        sizes = self.layout.expert_sizes
        expert_rank = place[-1] * sizes["ep"] // whole[-1]
        return tp + sizes["etp"] * (expert_rank + sizes["ep"] * sizes["edp"] * stage)

    def _stage(self, said: _Name, layer: int | None) -> int:
        """The pipeline stage that holds a layer, the embedding, or what follows the layers."""
        if layer is None:
            return 0 if said.root in ("embedding", "") else len(self.split) - 1
        stages = (
            stage
            for stage, chunks in enumerate(self.split)
            for chunk in range(len(chunks))
            if layer in chunk_layers(self.split, stage, chunk)
        )
        return next(stages, 0)


def _read(name: str) -> _Name:
    """Take a name apart."""
    words = name.split(".")
    begin = next((number for number, word in enumerate(words) if word in ROOTS), None)
    if begin is None:
        return _Name("", None, "", "", False, False)
    words = words[begin:]
    in_layer = words[:2] == ["decoder", "layers"] and len(words) > 3
    layer = int(words[2]) if in_layer and words[2].isdigit() else None
    return _Name(
        root=words[0],
        layer=layer,
        module=words[-2] if len(words) > 1 else "",
        leaf=words[-1],
        stacked_layers=in_layer and layer is None,
        stacked_experts=any(pair == ("experts", "experts") for pair in itertools.pairwise(words)),
    )


def _axis(said: _Name) -> int | None:
    """The axis that tp ranks divide, among the tensor's own."""
    if said.module in COLUMN and said.leaf in ("weight", "bias"):
        return 0
    return 1 if said.module in ROW and said.leaf == "weight" else None
