"""The architecture: what the weights mean. Nothing here depends on ranks or on how the model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_slm.config.option import option

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Linear layers that may have an adapter: of attention and MLP, by core's names."""

ADAPTER_SUFFIX = "_adapter"
"""Behind the name of a layer: the module of its adapter, ``linear_qkv_adapter.lora_a``."""


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
    num_moe_experts: int | None = option(
        None, "experts of a mixture-of-experts layer; default none, a dense model", minimum=1
    )
    moe_layer_freq: int = option(1, "every so many layers is a mixture of experts, counted from the first", minimum=1)
    moe_first_dense_layers: int = option(
        0, "this many first layers are dense whatever moe_layer_freq says (DeepSeek's first_k_dense_replace)", minimum=0
    )
    moe_ffn_hidden_size: int | None = option(None, "inner width of one expert; default ffn_hidden_size", minimum=1)
    moe_router_topk: int = option(2, "experts that each token is sent to", minimum=1)
    moe_router_score_function: str = option(
        "softmax", "what turns the router's logits into weights", choices=("softmax", "sigmoid")
    )
    moe_router_pre_softmax: bool = option(
        False, "softmax over all experts before the choice; false is over the chosen ones"
    )
    moe_router_num_groups: int | None = option(
        None, "groups of experts, of which moe_router_group_topk are considered for a token", minimum=1
    )
    moe_router_group_topk: int | None = option(None, "groups considered for a token", minimum=1)
    moe_router_topk_scaling_factor: float | None = option(None, "factor of the chosen experts' weights", above=0.0)
    moe_router_enable_expert_bias: bool = option(
        False, "balance by a bias that moves against the load after every step (arXiv 2408.15664)"
    )
    moe_router_bias_update_rate: float = option(1e-3, "how far that bias moves in a step", minimum=0.0)
    moe_router_load_balancing_type: str = option(
        "none",
        "balancing loss: over the micro-batch, or over each sample",
        choices=("none", "aux_loss", "seq_aux_loss"),
    )
    moe_aux_loss_coeff: float = option(0.0, "coefficient of the balancing loss", minimum=0.0)
    moe_z_loss_coeff: float = option(0.0, "coefficient of the router's z-loss (arXiv 2202.08906)", minimum=0.0)
    moe_shared_expert_intermediate_size: int | None = option(
        None, "inner width of the expert that every token passes; default none", minimum=1
    )
    moe_shared_expert_gate: bool = option(False, "a learned gate in front of the shared expert (Qwen2-MoE)")
    moe_expert_capacity_factor: float | None = option(
        None,
        "largest load of an expert, times the average load; tokens above it are dropped. Default dropless",
        above=0.0,
    )
    moe_token_drop_policy: str = option(
        "probs", "which tokens stay below the capacity: the most probable or the first", choices=("probs", "position")
    )
    qk_layernorm: bool = option(False, "a norm of every query and key head (Qwen3); of the latents with MLA")
    multi_latent_attention: bool = option(False, "keys and values from a shared latent (MLA, arXiv 2405.04434)")
    q_lora_rank: int | None = option(
        None, "rank of MLA's query latent; default none, queries are projected at once", minimum=1
    )
    kv_lora_rank: int = option(512, "rank of MLA's key/value latent", minimum=1)
    qk_head_dim: int = option(128, "channels of an MLA query/key head that carry no position", minimum=1)
    qk_pos_emb_head_dim: int = option(64, "channels of an MLA query/key head that are rotated", minimum=2)
    v_head_dim: int = option(128, "channels of an MLA value head", minimum=1)
    rope_type: str = option("rope", "rotary frequencies of MLA", choices=("rope", "yarn"))
    rotary_scaling_factor: float = option(40.0, "YaRN's factor (rope_type=yarn)", minimum=1.0)
    original_max_position_embeddings: int = option(4096, "length YaRN extends from", minimum=1)
    mscale: float = option(1.0, "YaRN's attention factor", minimum=0.0)
    mscale_all_dim: float = option(0.0, "YaRN's attention factor over all channels", minimum=0.0)
    mtp_num_layers: int | None = option(
        None, "further tokens predicted at each position, each by a layer of its own (MTP, arXiv 2412.19437)", minimum=1
    )
    mtp_loss_scaling_factor: float = option(0.1, "weight of the mean loss of those predictions", minimum=0.0)
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
    def expert_ffn_size(self) -> int:
        """Inner width of one expert's MLP (of one of the two halves, when gated)."""
        return self.moe_ffn_hidden_size or self.ffn_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer``, counted from 0 over the whole model, is a mixture of experts."""
        if self.num_moe_experts is None or layer < self.moe_first_dense_layers:
            return False
        return layer % self.moe_layer_freq == 0

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


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The ``lora`` section: low-rank adapters beside frozen weights (arXiv 2106.09685), y = W x + s B A x."""

    lora_rank: int = option(0, "rank of the adapters, which alone are trained; 0 trains the whole model", minimum=0)
    lora_alpha: float = option(16.0, "the adapters' output is multiplied by it over the rank", above=0.0)
    lora_rslora: bool = option(False, "divide lora_alpha by the root of the rank (arXiv 2312.03732)")
    lora_dropout: float = option(0.0, "dropout of what the adapters read", minimum=0.0, below=1.0)
    lora_targets: tuple[str, ...] = option(LORA_TARGETS, "linear layers with an adapter, by core's names")

    @property
    def scale(self) -> float:
        """s of y = W x + s B A x."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)
