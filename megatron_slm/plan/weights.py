"""Elements of weights on one rank, as arithmetic. No torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.counts import attention_matrices
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.layout import chunk_layers, layer_split


@dataclass(frozen=True)
class Weights:
    """Elements that are reduced over the dense replicas (dp x cp), and over the experts' (edp)."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


def chunk_split(config: RunConfig) -> tuple[tuple[range, ...], ...]:
    """``[stage][chunk]`` -> global indices of its layers."""
    return _held(config.model.num_layers, config.parallel)


@functools.lru_cache(maxsize=4096)
def _held(layers: int, parallel: ParallelConfig) -> tuple[tuple[range, ...], ...]:
    split = layer_split(layers, parallel)
    return tuple(
        tuple(chunk_layers(split, stage, chunk) for chunk in range(len(chunks))) for stage, chunks in enumerate(split)
    )


def layer_weights(config: RunConfig, *, moe: bool) -> Weights:
    """One layer's elements on one rank."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    norms = 2 * _norm(model, model.hidden_size)
    dense = _attention(model, tp) + norms
    if not moe:
        return Weights(dense + _mlp(model, model.ffn_size, tp))
    shared = model.moe_shared_expert_intermediate_size or 0
    gate = model.hidden_size if shared and model.moe_shared_expert_gate else 0
    experts = model.num_moe_experts or 0
    dense += model.hidden_size * experts + gate + (_mlp(model, shared, tp) if shared else 0)
    held = experts // config.parallel.expert_model_parallel_size
    return Weights(dense, held * _mlp(model, model.expert_ffn_size, config.parallel.expert_tp_size))


def linear_weights(config: RunConfig, stage: int) -> int:
    """Elements of the layers' matrices on a rank of a stage, but for the router: what FP8 multiplies."""
    model = config.model
    layers = [layer for chunk in chunk_split(config)[stage] for layer in chunk]
    sparse = sum(model.is_moe_layer(layer) for layer in layers)
    total = 0
    for moe, count in ((True, sparse), (False, len(layers) - sparse)):
        if count:
            others = 2 * _norm(model, model.hidden_size) + moe * model.hidden_size * (model.num_moe_experts or 0)
            total += count * (layer_weights(config, moe=moe).total - others)
    return total


def stage_weights(config: RunConfig) -> list[list[Weights]]:
    """``[stage][chunk]`` -> elements on one rank, embedding and output layer among them."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    layers = chunk_split(config)
    kinds = {moe: layer_weights(config, moe=moe) for moe in {model.is_moe_layer(i) for i in range(model.num_layers)}}
    found = [[sum((kinds[model.is_moe_layer(i)] for i in chunk), Weights()) for chunk in stage] for stage in layers]
    table = model.padded_vocab_size(model.vocab_size or 1) * model.hidden_size // tp
    positions = model.position_limit * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    found[0][0] += Weights(table + positions)
    # Tied, the output layer is the embedding's matrix on one stage and a copy of it on another.
    own_output = model.untie_embeddings_and_output_weights or len(layers) > 1
    found[-1][-1] += Weights((table if own_output else 0) + _norm(model, model.hidden_size))
    for _ in range(model.mtp_num_layers or 0):
        found[-1][-1] += kinds[model.is_moe_layer(model.num_layers - 1)]
        found[-1][-1] += Weights(2 * model.hidden_size**2 // tp + 3 * _norm(model, model.hidden_size))
    if model.mtp_num_layers and len(layers) > 1:
        found[-1][-1] += Weights(table)  # the predictions' copy of the embedding
    return found


def _attention(model: ModelConfig, tp: int) -> int:
    projection = model.hidden_size if model.add_bias_linear else 0
    if model.multi_latent_attention:
        latents = model.kv_lora_rank + model.qk_pos_emb_head_dim + (model.q_lora_rank or 0)
        down = model.hidden_size * latents  # every tp rank holds them whole
        norms = _norm(model, model.kv_lora_rank) + _norm(model, model.q_lora_rank or 0) if model.qk_layernorm else 0
        return (attention_matrices(model) - down) // tp + down + norms + projection
    rows = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
    biases = rows // tp if model.add_bias_linear or model.add_qkv_bias else 0
    norms = 2 * _norm(model, model.head_dim) if model.qk_layernorm else 0
    return attention_matrices(model) // tp + biases + norms + projection


def _mlp(model: ModelConfig, width: int, tp: int) -> int:
    gates = 2 if model.swiglu else 1
    biases = gates * width // tp + model.hidden_size if model.add_bias_linear else 0
    return (gates + 1) * model.hidden_size * width // tp + biases


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)
