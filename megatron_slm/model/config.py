"""The architecture: what the weights mean. Nothing here depends on ranks or on how the model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a GPT-like decoder. Two runs with equal ``model`` sections hold the same global parameters."""

    num_layers: int = option(2, "transformer layers", minimum=1)
    hidden_size: int = option(128, "width of the residual stream", minimum=1)
    ffn_hidden_size: int | None = option(
        None, "inner width of the MLP; default 4 x hidden_size, or 8/3 rounded up to 64 with swiglu", minimum=1
    )
    num_attention_heads: int = option(4, "query heads", minimum=1)
    num_query_groups: int | None = option(
        None, "key/value heads (grouped-query attention); default num_attention_heads", minimum=1
    )
    kv_channels: int | None = option(
        None, "dimension of one head; default hidden_size / num_attention_heads", minimum=1
    )
    seq_length: int = option(256, "tokens in one training sample", minimum=1)
    max_position_embeddings: int | None = option(
        None, "longest sequence the positions are defined for; default seq_length", minimum=1
    )
    vocab_size: int | None = option(
        None, "entries of the vocabulary before padding; default the tokenizer's", minimum=1
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "the embedding has a multiple of this many rows, whatever the layout; padding rows never enter the loss",
        minimum=1,
    )
    position_embedding_type: str = option("rope", "how positions enter", choices=("rope", "learned_absolute", "none"))
    rotary_base: float = option(10000.0, "theta of the rotary embedding", minimum=1.0)
    rotary_percent: float = option(1.0, "share of each head that is rotated", minimum=0.0, maximum=1.0)
    use_rope_scaling: bool = option(False, "scale rotary frequencies as Llama 3.1 does")
    rope_scaling_factor: float = option(8.0, "factor of use_rope_scaling", minimum=1.0)
    normalization: str = option("RMSNorm", "the norm before attention and MLP", choices=("RMSNorm", "LayerNorm"))
    layernorm_epsilon: float = option(1e-5, "added to the variance in every norm", minimum=0.0, flag="norm-epsilon")
    swiglu: bool = option(True, "gated SiLU in the MLP; false is GELU")
    openai_gelu: bool = option(False, "tanh approximation of GELU (GPT-2); needs swiglu false")
    add_bias_linear: bool = option(False, "biases in the linear layers", flag="disable-bias-linear")
    add_qkv_bias: bool = option(False, "biases in the query/key/value projection alone (Qwen2)")
    untie_embeddings_and_output_weights: bool = option(True, "separate matrices for embedding and output")
    attention_dropout: float = option(0.0, "dropout of the attention probabilities", minimum=0.0, below=1.0)
    hidden_dropout: float = option(0.0, "dropout after attention, MLP and embedding", minimum=0.0, below=1.0)
    init_method_std: float = option(0.02, "standard deviation of initial weights", above=0.0)
    mup_base_hidden_size: int | None = option(
        None,
        "width at which init_method_std and lr were tuned: hidden matrices are scaled to hidden_size by muP",
        minimum=1,
    )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads; equals the query heads without grouped-query attention."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP (of one of the two halves, when gated)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-(8 * self.hidden_size // 3) // 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def position_limit(self) -> int:
        """Number of positions the model is defined for."""
        return self.max_position_embeddings or self.seq_length

    @property
    def width_multiplier(self) -> float:
        """muP's m = hidden_size / base width; 1.0 when the option is off."""
        return self.hidden_size / self.mup_base_hidden_size if self.mup_base_hidden_size else 1.0

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for ``vocab_size`` tokens. Independent of the layout, so that checkpoints reshard."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple
