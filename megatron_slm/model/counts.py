"""Parameters and floating-point operations of a model, as arithmetic. No torch."""

from __future__ import annotations

from megatron_slm.model.config import ModelConfig


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model.

    Args:
        model: the architecture.
        vocab_size: rows of the embedding to count: the tokenizer's size for the published number,
            ``model.padded_vocab_size(...)`` for what is held in memory.
    """
    norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    layer = layer_matrix_parameters(model) + layer_bias_parameters(model) + 2 * norm
    embedding = vocab_size * model.hidden_size
    positions = model.position_limit * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    output = embedding if model.untie_embeddings_and_output_weights else 0
    return embedding + positions + model.num_layers * layer + norm + output


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Weights of the four linear layers (query/key/value, projection, MLP in and out) of one transformer layer."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.query_groups)
    mlp = model.hidden_size * model.ffn_size * (3 if model.swiglu else 2)
    return attention + mlp


def layer_bias_parameters(model: ModelConfig) -> int:
    """Biases of the linear layers of one transformer layer."""
    qkv = model.head_dim * (model.num_attention_heads + 2 * model.query_groups)
    if model.add_bias_linear:
        return qkv + model.hidden_size + model.ffn_size * (2 if model.swiglu else 1) + model.hidden_size
    return qkv if model.add_qkv_bias else 0


def flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Model FLOPs of the forward and backward pass for one token of a full-length sample.

    ``6 x (matrix parameters) + 6 x num_layers x num_attention_heads x head_dim x seq_length``: a multiply-add is two
    operations and the backward pass costs twice the forward pass. Matrix parameters are those of the linear layers and
    of the output layer (tied or not); the embedding lookup, norms, biases, activations and softmax are left out. The
    second term is the two matrix products of attention, 12 x ... x seq_length, halved because a causal token sees half
    of the sample on average. Recomputation is not counted (Chowdhery et al., arXiv 2204.02311, appendix B, where the
    causal half is not taken).

    Args:
        model: the architecture; ``seq_length`` is the sample's length.
        vocab_size: columns of the output layer to count.
    """
    matrices = model.num_layers * layer_matrix_parameters(model) + vocab_size * model.hidden_size
    attention = model.num_layers * model.num_attention_heads * model.head_dim * model.seq_length
    return 6.0 * (matrices + attention)
