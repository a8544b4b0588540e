"""A model of the same structure in a few thousand parameters: every option stays, sizes shrink, ratios hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from megatron_slm.config.downscale_axes import HELD, Degrees
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.layout import split_layers

SEQUENCE = 64
"""Tokens of a sample: whole zigzag chunks on two context ranks, whole parts on two tensor-parallel ranks."""

VOCABULARY = 512
"""Rows of the embedding, or a little more."""

_WIDTH, _WIDEST, _UNIT = 64, 128, 16
_LARGEST_RATIO = 16
"""Of heads to groups, and of positions to tokens of a sample: beyond it a small model cannot follow."""

_MTP_LAYERS, _TOPK, _ROUTER_GROUPS, _EXPERTS = 2, 4, 4, 4
_LATENT = MappingProxyType(
    {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
)
"""Sizes of multi-latent attention, in about the proportions of DeepSeek-V3."""

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "num_layers": "few layers: every pipeline chunk and every kind of layer is there",
        "hidden_size": "narrow",
        "ffn_hidden_size": "its ratio to hidden_size",
        "num_attention_heads": "its ratio to the key/value heads",
        "num_query_groups": "one where tp shares heads, else two or more",
        "kv_channels": "narrow",
        "seq_length": "short samples that divide over cp and tp",
        "max_position_embeddings": "its ratio to seq_length",
        "vocab_size": "a small vocabulary, padded where the original is",
        "make_vocab_size_divisible_by": "rows that divide over two tensor-parallel ranks",
        "num_moe_experts": "a few on every expert rank, more than are chosen",
        "moe_layer_freq": "dense layers between the experts, every other one",
        "moe_first_dense_layers": "one dense layer first",
        "moe_ffn_hidden_size": "its ratio to hidden_size",
        "moe_router_topk": "fewer than there are experts",
        "moe_router_num_groups": "a few experts in every group",
        "moe_router_group_topk": "its ratio to the groups",
        "moe_shared_expert_intermediate_size": "its ratio to hidden_size",
        "q_lora_rank": "small latents",
        "kv_lora_rank": "small latents",
        "qk_head_dim": "small heads",
        "qk_pos_emb_head_dim": "small heads",
        "v_head_dim": "small heads",
        "original_max_position_embeddings": "its ratio to seq_length",
        "mtp_num_layers": "as few as show the chain of predictions",
        "mup_base_hidden_size": "the same width multiplier",
    }
)
"""Field of the section -> why it changes."""


def shrunken(config: RunConfig, original: Degrees, tokenizer_size: int | None) -> ModelConfig:
    """The small model, the same one whatever part of the axes a run holds.

    Args:
        original: degrees of the large job.
        tokenizer_size: entries that the vocabulary must have at least; None without a tokenizer.
    """
    model = config.model
    values: dict[str, int | None] = {**_attention(model, original), **_positions(model, original)}
    width = values.get("hidden_size") or model.hidden_size
    values |= {
        "num_layers": layers(config, original),
        "ffn_hidden_size": _share(model.ffn_hidden_size, model, width),
        "vocab_size": _vocabulary(model, tokenizer_size),
        "make_vocab_size_divisible_by": math.lcm(model.make_vocab_size_divisible_by, HELD if original.tp > 1 else 1),
        "mtp_num_layers": model.mtp_num_layers and min(model.mtp_num_layers, _MTP_LAYERS),
        "mup_base_hidden_size": model.mup_base_hidden_size and max(1, round(width / model.width_multiplier)),
        **_experts(model, width),
    }
    return _replaced(model, values)


def layers(config: RunConfig, original: Degrees) -> int:
    """Layers of the small model: two in every chunk of its pipeline, and every kind of layer of the original.

    A chunk has one where the original's has one. With interleaving, the first and the last may have one fewer.
    """
    chunks = (HELD if original.pp > 1 else 1) * (HELD if original.vpp > 1 else 1)
    counted = flags_counted(config) if original.pp > 1 else 0
    large = (config.model.num_layers + counted) // (original.pp * original.vpp)
    kinds = _kinds(config.model, config.model.num_layers)
    pattern = _replaced(config.model, _pattern(config.model))
    per_chunk = min(large, 3 if counted and original.vpp == 1 else 2)
    while True:
        found = per_chunk * chunks - counted
        if found >= 1 and _kinds(pattern, found) >= kinds and _divides(config, original, found):
            return found
        per_chunk += 1


def flags_counted(config: RunConfig) -> int:
    """How many layers the embedding and the output layer count as in the pipeline split."""
    parallel = config.parallel
    return parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split


def _divides(config: RunConfig, original: Degrees, found: int) -> bool:
    """Whether so many layers fit the pipeline of two stages."""
    if original.pp == 1:
        return True
    try:
        split_layers(
            found,
            HELD,
            HELD if original.vpp > 1 else None,
            embedding_counts=config.parallel.account_for_embedding_in_pipeline_split,
            loss_counts=config.parallel.account_for_loss_in_pipeline_split,
        )
    except ConfigError:
        return False
    return True


def _kinds(model: ModelConfig, num_layers: int) -> set[bool]:
    """Whether dense layers (False) and mixtures of experts (True) are among the layers."""
    return {model.is_moe_layer(layer) for layer in range(num_layers)}


def _attention(model: ModelConfig, original: Degrees) -> dict[str, int | None]:
    """Width, heads and groups. Key/value heads that tp ranks share stay shared."""
    if model.multi_latent_attention:
        latent = {name: value for name, value in _LATENT.items() if getattr(model, name) is not None}
        small: dict[str, int | None] = {name: min(value, getattr(model, name)) for name, value in latent.items()}
        groups = model.num_query_groups and 4
        return small | {"hidden_size": _WIDTH, "num_attention_heads": 4, "num_query_groups": groups}
    heads, groups = model.num_attention_heads, model.query_groups
    divides = heads % HELD == 0 and (groups == 1 or groups % HELD == 0)
    if model.hidden_size <= _WIDEST and (original.tp == 1 or divides):
        return {}
    ratio = min(heads // groups, _LARGEST_RATIO)
    few = 1 if groups == 1 or groups < original.tp else 4 if ratio == 1 and groups >= 4 else 2
    many = few * ratio
    many += many % HELD if original.tp > 1 else 0
    head = _head_dim(model, many)
    width = many * head
    if model.kv_channels is not None:
        width = _rounded(width * model.hidden_size / (model.kv_channels * heads))
    return {
        "hidden_size": width,
        "num_attention_heads": many,
        "num_query_groups": model.num_query_groups and few,
        "kv_channels": model.kv_channels and head,
    }


def _head_dim(model: ModelConfig, heads: int) -> int:
    """Channels of a head: a power of two for a width of about 64, at least 8 up to 128, and whole rotated pairs."""
    size = max(_power_of_two(_WIDTH // heads), min(8, _power_of_two(_WIDEST // heads)))
    while model.position_embedding_type == "rope" and size < _WIDEST:
        rotated = int(size * model.rotary_percent)
        if rotated and rotated % 2 == 0:
            break
        size *= 2
    return size


def _power_of_two(number: int) -> int:
    """The largest power of two up to ``number``, at least 1."""
    return 1 << max(1, number).bit_length() - 1


def _positions(model: ModelConfig, original: Degrees) -> dict[str, int | None]:
    """Samples and the positions they may have."""
    length = min(model.seq_length, SEQUENCE)
    divided = (2 * HELD if original.cp > 1 else 1) * (HELD if original.tp > 1 else 1)
    length = length // divided * divided or length
    limit = model.max_position_embeddings
    ratio = min(_LARGEST_RATIO, max(1, (limit or 0) // model.seq_length))
    found = {"seq_length": length, "max_position_embeddings": limit and min(limit, length * ratio)}
    if model.rope_type == "yarn":
        scaled = model.original_max_position_embeddings * length // model.seq_length
        found["original_max_position_embeddings"] = max(8, min(scaled, length * _LARGEST_RATIO))
    return found


def _vocabulary(model: ModelConfig, tokenizer_size: int | None) -> int | None:
    """Entries of the vocabulary: padded to the rows of the embedding where the original's are."""
    if model.vocab_size is None:
        return None
    unit = math.lcm(HELD, model.make_vocab_size_divisible_by)
    rows = _multiple(max(VOCABULARY, tokenizer_size or 0), unit)
    padded = model.vocab_size % model.make_vocab_size_divisible_by != 0
    wanted = rows - 1 if padded and rows > (tokenizer_size or 0) else rows
    return min(model.vocab_size, wanted)


def _pattern(model: ModelConfig) -> dict[str, int | None]:
    """Where the mixtures of experts stand."""
    return {
        "moe_layer_freq": min(model.moe_layer_freq, 2),
        "moe_first_dense_layers": min(model.moe_first_dense_layers, 1),
    }


def _experts(model: ModelConfig, width: int) -> dict[str, int | None]:
    """Experts, router groups and widths of a mixture of experts; nothing for a dense model."""
    experts, topk = model.num_moe_experts, min(model.moe_router_topk, _TOPK)
    if experts is None:
        return {}
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    small = min(groups or 1, _ROUTER_GROUPS)
    taken = max(1, (chosen or 1) * small // (groups or 1))
    topk = max(1, topk // taken) * taken
    few = max(_EXPERTS, 2 * topk * small // taken)
    few = _multiple(few, math.lcm(small, HELD))
    choice: dict[str, int | None] = {"num_moe_experts": few, "moe_router_topk": topk}
    choice |= {"moe_router_num_groups": groups and small, "moe_router_group_topk": chosen and taken}
    return {
        **_pattern(model),
        **(choice if few < experts or experts % HELD else {}),
        "moe_ffn_hidden_size": _share(model.moe_ffn_hidden_size, model, width),
        "moe_shared_expert_intermediate_size": _share(model.moe_shared_expert_intermediate_size, model, width),
    }


def _share(size: int | None, model: ModelConfig, width: int) -> int | None:
    """An inner width in its ratio to the residual stream; None stays, it is derived from the width."""
    if size is None or (width == model.hidden_size and size % HELD == 0):
        return size
    return _rounded(size * width / model.hidden_size)


def _multiple(number: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``number``."""
    return -(-number // unit) * unit


def _rounded(width: float) -> int:
    """The nearest width that divides over a few ranks."""
    return max(_UNIT, round(width / _UNIT) * _UNIT)


def _replaced(model: ModelConfig, values: Mapping[str, int | None]) -> ModelConfig:
    """``model`` with other sizes."""
    return dataclasses.replace(model, **values)  # type: ignore[arg-type]
