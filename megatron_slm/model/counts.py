"""Parameters and floating-point operations of a model, as arithmetic. No torch."""

from __future__ import annotations

from megatron_slm.model.config import LoraConfig, ModelConfig


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, layers of multi-token prediction among them.

    Args:
        model: the architecture.
        vocab_size: rows of the embedding to count: the tokenizer's size for the published number,
            ``model.padded_vocab_size(...)`` for what is held in memory.
    """
    return _parameters(model, vocab_size, routed=model.num_moe_experts or 0)


def active_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that one token meets: of the routed experts only the ``moe_router_topk`` it is sent to."""
    return _parameters(model, vocab_size, routed=model.moe_router_topk if model.num_moe_experts else 0)


def adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters of all layers; 0 without adapters."""
    sizes = adapter_sizes(model)
    return model.num_layers * lora.lora_rank * sum(sum(sizes[target]) for target in lora.lora_targets)


def adapter_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a dense layer that may have an adapter, by core's names."""
    width, heads = model.hidden_size, model.num_attention_heads
    attended = heads * (model.v_head_dim if model.multi_latent_attention else model.head_dim)
    return {
        "linear_qkv": (width, model.head_dim * (heads + 2 * model.query_groups)),
        "linear_proj": (attended, width),
        "linear_fc1": (width, model.ffn_size * (2 if model.swiglu else 1)),
        "linear_fc2": (model.ffn_size, width),
    }


def parameters_text(model: ModelConfig, vocab_size: int, lora: LoraConfig | None = None) -> str:
    """The number of parameters in words, and how many are active or trained where these are fewer."""
    adapters = adapter_parameters(model, lora) if lora is not None else 0
    count, active = (each(model, vocab_size) + adapters for each in (parameters, active_parameters))
    notes = [f"{active:,} active"] if active != count else []
    notes += [f"{adapters:,} trained, {adapters / count:.2%}"] if adapters else []
    return f"{count:,}" + (f" ({', '.join(notes)})" if notes else "")


def flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Model FLOPs of the forward and backward pass for one token of a full-length sample.

    ``6 x (matrix parameters) + 6 x layers x num_attention_heads x head_dim x seq_length``: a multiply-add is two
    operations and the backward pass costs twice the forward pass. Matrix parameters are those a token meets in the
    linear layers, routers and chosen experts, and of the output layer (tied or not), once more for every depth of
    multi-token prediction; the embedding lookup, norms, biases, activations and softmax are left out. The second term
    is the two matrix products of attention, 12 x ... x seq_length, halved because a causal token sees half of the
    sample on average; with latent attention head_dim is the mean width of its query and value heads. Recomputation and
    dropped tokens are not counted (Chowdhery et al., arXiv 2204.02311, appendix B, where the causal half is not taken).

    Args:
        model: the architecture; ``seq_length`` is the sample's length.
        vocab_size: columns of the output layer to count.
    """
    depths = model.mtp_num_layers or 0
    matrices = sum(
        attention_matrices(model) + feed_forward_matrices(model, layer, routed=model.moe_router_topk)
        for layer in layers_with_predictions(model)
    )
    matrices += depths * 2 * model.hidden_size**2 + (1 + depths) * vocab_size * model.hidden_size
    attention = (model.num_layers + depths) * model.num_attention_heads * attention_width(model) * model.seq_length
    return 6.0 * (matrices + attention)


def layers_with_predictions(model: ModelConfig) -> list[int]:
    """Every layer, counted from 0, and the last one again for each depth of multi-token prediction, made like it."""
    return [*range(model.num_layers), *[model.num_layers - 1] * (model.mtp_num_layers or 0)]


def attention_matrices(model: ModelConfig) -> int:
    """Weights of the linear layers of one attention: query, key, value and projection, or MLA's down and up ones."""
    width, heads = model.hidden_size, model.num_attention_heads
    if not model.multi_latent_attention:
        return width * model.head_dim * (2 * heads + 2 * model.query_groups)
    queries, rank = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim), model.q_lora_rank
    query = width * queries if rank is None else rank * (width + queries)
    down = width * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
    return query + down + up + heads * model.v_head_dim * width


def attention_width(model: ModelConfig) -> float:
    """Channels of a head in the two products of attention, on average."""
    if model.multi_latent_attention:
        return (model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim) / 2
    return float(model.head_dim)


def feed_forward_matrices(model: ModelConfig, layer: int, *, routed: int) -> int:
    """Weights of the MLP of ``layer``, or of its router, ``routed`` of its experts and its shared expert."""
    if not model.is_moe_layer(layer):
        return _mlp_matrices(model, model.ffn_size)
    router = model.hidden_size * (model.num_moe_experts or 0)
    shared = _mlp_matrices(model, model.moe_shared_expert_intermediate_size or 0)
    gate = model.hidden_size if shared and model.moe_shared_expert_gate else 0
    return router + routed * _mlp_matrices(model, model.expert_ffn_size) + shared + gate


def _parameters(model: ModelConfig, vocab_size: int, *, routed: int) -> int:
    """Parameters with ``routed`` experts in each mixture-of-experts layer."""
    layers = sum(_layer_parameters(model, layer, routed) for layer in layers_with_predictions(model))
    embedding = vocab_size * model.hidden_size
    positions = model.position_limit * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    output = embedding if model.untie_embeddings_and_output_weights else 0
    # Each depth of prediction has a matrix from hidden state and embedding to its layer, and a norm behind all three.
    depth = 2 * model.hidden_size**2 + 3 * _norm(model, model.hidden_size)
    predictions = (model.mtp_num_layers or 0) * depth
    return embedding + positions + layers + predictions + _norm(model, model.hidden_size) + output


def _layer_parameters(model: ModelConfig, layer: int, routed: int) -> int:
    matrices = attention_matrices(model) + feed_forward_matrices(model, layer, routed=routed)
    norms = 2 * _norm(model, model.hidden_size) + _attention_norms(model)
    return matrices + _attention_biases(model) + _feed_forward_biases(model, layer, routed) + norms


def _feed_forward_biases(model: ModelConfig, layer: int, routed: int) -> int:
    """Those of the MLP or of the experts, and the router's, which balances the load and which no gradient trains."""
    if not model.is_moe_layer(layer):
        return _mlp_biases(model, model.ffn_size)
    balancing = (model.num_moe_experts or 0) if model.moe_router_enable_expert_bias else 0
    return routed * _mlp_biases(model, model.expert_ffn_size) + balancing


def _mlp_matrices(model: ModelConfig, width: int) -> int:
    return model.hidden_size * width * (3 if model.swiglu else 2)


def _mlp_biases(model: ModelConfig, width: int) -> int:
    return width * (2 if model.swiglu else 1) + model.hidden_size if model.add_bias_linear else 0


def _attention_biases(model: ModelConfig) -> int:
    projection = model.hidden_size if model.add_bias_linear else 0
    if model.multi_latent_attention or not (model.add_bias_linear or model.add_qkv_bias):
        return projection
    return projection + model.head_dim * (model.num_attention_heads + 2 * model.query_groups)


def _attention_norms(model: ModelConfig) -> int:
    if not model.qk_layernorm:
        return 0
    if model.multi_latent_attention:
        return _norm(model, model.kv_lora_rank) + _norm(model, model.q_lora_rank or 0)
    return 2 * _norm(model, model.head_dim)


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)
