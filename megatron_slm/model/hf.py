"""The names and layouts of Hugging Face's tensors, and how each becomes a block of one of core's, bit for bit.

Core stores the layers of a model stacked, ``decoder.layers.mlp.linear_fc1.weight`` [layers, 2 F, H]; a :class:`Block`
is one layer (one expert) of such a tensor. Query, key and value rows lie by key/value head: the query heads of its
group, then its key, then its value. A gated MLP's first matrix is [gate; up]. GPT-2's ``Conv1D`` weights are
transposed. Padding rows of the vocabulary are zero when read and are left out when written.

Shapes: H hidden, F inner width of the MLP, V vocabulary, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.model.config import ModelConfig

LAYERS = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
OUTPUT_PART = "lm_head.weight"

IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Masks and frequencies that older releases of transformers saved beside the weights; config.json implies them."""


@dataclass(frozen=True)
class Part:
    """A tensor of the Hugging Face files, and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A block of one of core's tensors, and what it is made of.

    Attributes:
        name: of the stored tensor.
        index: where the block lies on the stacked axes: the layer, the expert; empty for a tensor of its own.
        counts: sizes of these axes.
        shape: of the block without these axes.
        parts: the Hugging Face tensors whose rows follow each other in it.
        transposed: they are stored [in, out].
        heads: (N, G, D) where the rows are query, key and value.
    """

    name: str
    index: tuple[int, ...]
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    heads: tuple[int, int, int] | None = None

    @property
    def rows(self) -> int:
        """Rows that the parts fill; the others are padding."""
        return sum(part.shape[-1] if self.transposed else part.shape[0] for part in self.parts)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole stored tensor."""
        return self.counts + self.shape

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block [``shape``] from its parts, in their order."""
        rows = torch.cat([tensor.t() if self.transposed else tensor for tensor in tensors])
        if self.heads is not None:
            rows = rows[by_group(*self.heads)]
        missing = self.shape[0] - len(rows)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()

    def split(self, block: Tensor) -> list[Tensor]:
        """The parts from the block: what :meth:`join` undoes."""
        rows = block[: self.rows]
        if self.heads is not None:
            rows = rows[by_group(*self.heads).argsort()]
        sizes = [part.shape[-1] if self.transposed else part.shape[0] for part in self.parts]
        return [(piece.t() if self.transposed else piece).contiguous() for piece in rows.split(sizes)]


def by_group(heads: int, groups: int, head_dim: int) -> Tensor:
    """Rows of [queries; keys; values] in core's order: for each group its query heads, its key head, its value head.

    Returns:
        int64 [(N + 2 G) D].
    """
    queries = torch.arange(heads * head_dim).view(groups, -1)
    keys = heads * head_dim + torch.arange(groups * head_dim).view(groups, -1)
    return torch.cat([queries, keys, keys + groups * head_dim], dim=1).reshape(-1)


def blocks(model: ModelConfig, model_type: str, vocab_size: int) -> list[Block]:
    """Every tensor of a model, block by block: stacked tensors one after the other, layers in order.

    Args:
        model_type: of ``hf_config.MODEL_TYPES``.
        vocab_size: rows of the embedding in the Hugging Face files.
    """
    return list(_gpt2(model, vocab_size) if model_type == "gpt2" else _decoder(model, model_type, vocab_size))


def without_prefix(name: str, known: frozenset[str]) -> str:
    """The name a tensor has in a model with a head: files of the bare decoder leave the first word out."""
    for prefix in ("model.", "transformer."):
        if name not in known and prefix + name in known:
            return prefix + name
    return name


def _decoder(model: ModelConfig, model_type: str, vocab_size: int) -> Iterator[Block]:
    """Llama, Mistral, Qwen2, Qwen3, Mixtral."""
    hidden = model.hidden_size
    yield _vocabulary(model, EMBEDDING, "model.embed_tokens.weight", vocab_size)
    yield from _norms(model, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    yield from _attention(model)
    if model_type == "qwen3":
        for head in ("q", "k"):
            suffix = f"self_attention.{head}_layernorm.weight"
            yield from _each_layer(
                model, suffix, (model.head_dim,), [(f"self_attn.{head}_norm.weight", model.head_dim)]
            )
    if model_type == "mixtral":
        yield from _norms(model, "pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
        yield from _experts(model)
    else:
        yield from _norms(model, "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight")
        yield from _gated_mlp(model)
    yield Block("decoder.final_layernorm.weight", (), (), (hidden,), (Part("model.norm.weight", (hidden,)),))
    if model.untie_embeddings_and_output_weights:
        yield _vocabulary(model, OUTPUT, OUTPUT_PART, vocab_size)


def _vocabulary(model: ModelConfig, name: str, part: str, vocab_size: int) -> Block:
    shape = (model.padded_vocab_size(vocab_size), model.hidden_size)
    return Block(name, (), (), shape, (Part(part, (vocab_size, model.hidden_size)),))


def _each_layer(
    model: ModelConfig,
    suffix: str,
    shape: tuple[int, ...],
    rows: Sequence[tuple[str, int]],
    *,
    heads: tuple[int, int, int] | None = None,
) -> Iterator[Block]:
    """One of a layer's tensors, for all layers.

    Args:
        suffix: its name within the layer.
        rows: the parts' names within the layer, with their rows.
    """
    for layer in range(model.num_layers):
        parts = tuple(Part(f"model.layers.{layer}.{name}", (count, *shape[1:])) for name, count in rows)
        yield Block(LAYERS + suffix, (layer,), (model.num_layers,), shape, parts, heads=heads)


def _norms(model: ModelConfig, suffix: str, part: str) -> Iterator[Block]:
    return _each_layer(model, suffix, (model.hidden_size,), [(part, model.hidden_size)])


def _attention(model: ModelConfig) -> Iterator[Block]:
    hidden, heads = model.hidden_size, (model.num_attention_heads, model.query_groups, model.head_dim)
    queries, keys = heads[0] * heads[2], heads[1] * heads[2]
    sizes = {"q": queries, "k": keys, "v": keys}
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    weights = [(f"self_attn.{name}_proj.weight", count) for name, count in sizes.items()]
    yield from _each_layer(model, f"{qkv}.weight", (queries + 2 * keys, hidden), weights, heads=heads)
    if model.add_bias_linear or model.add_qkv_bias:
        biases = [(f"self_attn.{name}_proj.bias", count) for name, count in sizes.items()]
        yield from _each_layer(model, f"{qkv}.bias", (queries + 2 * keys,), biases, heads=heads)
    yield from _each_layer(model, f"{proj}.weight", (hidden, queries), [("self_attn.o_proj.weight", hidden)])
    if model.add_bias_linear:
        yield from _each_layer(model, f"{proj}.bias", (hidden,), [("self_attn.o_proj.bias", hidden)])


def _gated_mlp(model: ModelConfig) -> Iterator[Block]:
    hidden, inner = model.hidden_size, model.ffn_size
    for kind in ("weight", "bias") if model.add_bias_linear else ("weight",):
        columns = {"weight": ((hidden,), (inner,)), "bias": ((), ())}[kind]
        halves = [(f"mlp.{name}_proj.{kind}", inner) for name in ("gate", "up")]
        yield from _each_layer(model, f"mlp.linear_fc1.{kind}", (2 * inner, *columns[0]), halves)
        down = [(f"mlp.down_proj.{kind}", hidden)]
        yield from _each_layer(model, f"mlp.linear_fc2.{kind}", (hidden, *columns[1]), down)


def _experts(model: ModelConfig) -> Iterator[Block]:
    """Mixtral's router and gated experts; an expert's first matrix is [w1; w3]."""
    hidden, inner, experts = model.hidden_size, model.expert_ffn_size, model.num_moe_experts or 1
    yield from _each_layer(model, "mlp.router.weight", (experts, hidden), [("block_sparse_moe.gate.weight", experts)])
    matrices = {
        "linear_fc1": ((2 * inner, hidden), {"w1": (inner, hidden), "w3": (inner, hidden)}),
        "linear_fc2": ((hidden, inner), {"w2": (hidden, inner)}),
    }
    for name, (shape, stored) in matrices.items():
        for layer in range(model.num_layers):
            for expert in range(experts):
                inside = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                parts = tuple(Part(f"{inside}.{part}.weight", size) for part, size in stored.items())
                counts = (model.num_layers, experts)
                yield Block(f"{LAYERS}mlp.experts.experts.{name}.weight", (layer, expert), counts, shape, parts)


GPT2_LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}
GPT2_NORMS = {"ln_1": "self_attention.linear_qkv.layer_norm", "ln_2": "mlp.linear_fc1.layer_norm"}


def _gpt2(model: ModelConfig, vocab_size: int) -> Iterator[Block]:
    """GPT-2, whose linear layers are stored [in, out] and whose queries, keys and values are one matrix."""
    hidden, inner = model.hidden_size, model.ffn_size
    heads = (model.num_attention_heads, model.num_attention_heads, model.head_dim)
    yield _vocabulary(model, EMBEDDING, "transformer.wte.weight", vocab_size)
    positions = (model.position_limit, hidden)
    yield Block("embedding.position_embeddings.weight", (), (), positions, (Part("transformer.wpe.weight", positions),))
    sizes = {"attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden)}
    sizes |= {"mlp.c_fc": (inner, hidden), "mlp.c_proj": (hidden, inner)}
    for theirs, ours in GPT2_NORMS.items():
        for kind in ("weight", "bias"):
            yield from _gpt2_layers(model, f"{ours}_{kind}", f"{theirs}.{kind}", (hidden,), None)
    for theirs, ours in GPT2_LINEARS.items():
        grouped = heads if theirs == "attn.c_attn" else None
        yield from _gpt2_layers(model, f"{ours}.weight", f"{theirs}.weight", sizes[theirs], grouped)
        yield from _gpt2_layers(model, f"{ours}.bias", f"{theirs}.bias", sizes[theirs][:1], grouped)
    for kind in ("weight", "bias"):
        part = Part(f"transformer.ln_f.{kind}", (hidden,))
        yield Block(f"decoder.final_layernorm.{kind}", (), (), (hidden,), (part,))
    if model.untie_embeddings_and_output_weights:
        yield _vocabulary(model, OUTPUT, OUTPUT_PART, vocab_size)


def _gpt2_layers(
    model: ModelConfig, suffix: str, part: str, shape: tuple[int, ...], heads: tuple[int, int, int] | None
) -> Iterator[Block]:
    for layer in range(model.num_layers):
        stored = Part(f"transformer.h.{layer}.{part}", shape[::-1])
        yield Block(
            LAYERS + suffix, (layer,), (model.num_layers,), shape, (stored,), transposed=len(shape) == 2, heads=heads
        )
