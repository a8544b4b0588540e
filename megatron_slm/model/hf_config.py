"""A Hugging Face ``config.json`` -> our ``model`` section. What that section cannot express is refused by its key.

Written against transformers 5.23 (``rope_parameters``); the keys of transformers 4 (``rope_theta``, ``rope_scaling``)
are read as well. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_slm.errors import CheckpointError

CONFIG_FILE = "config.json"
LONGEST_SAMPLE = 4096
"""``seq_length`` of an imported model, where its positions reach further: config.json does not say what to train at."""

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What core 0.16 fixes of Llama 3's frequency scaling; only the factor is free."""

DECODER = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
"""Model types that are Llama but for biases, norms of heads, windows and experts."""
MODEL_TYPES = (*DECODER, "gpt2")

NOT_ARCHITECTURE = frozenset(
    (
        "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id",
        "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "_name_or_path", "_attn_implementation_autoset",
        "task_specific_params", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "reorder_and_upcast_attn", "attn_implementation", "max_window_layers", "return_dict", "problem_type",
        "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "n_ctx",
        "router_jitter_noise", "is_llama_config", "transformers.js_config", "vocab_size",
    )
)  # fmt: skip
"""Keys that change no logit of a model in evaluation mode, or that are read where they matter."""


@dataclass(frozen=True)
class Architecture:
    """What a ``config.json`` says.

    Attributes:
        model_type: one of ``MODEL_TYPES``.
        section: values of the ``model`` section by field.
        vocab_size: rows of the embedding in the files.
        tokens: ``bos_token_id`` and its like, as they are written.
        notes: what a user must know of the import, in sentences.
        unread: keys that nothing here knows.
    """

    model_type: str
    section: Mapping[str, Any]
    vocab_size: int
    tokens: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def read_config(directory: Path) -> Architecture:
    """The architecture of a model's directory.

    Raises:
        CheckpointError: there is no config.json, it is damaged, or it holds something that the ``model`` section cannot
            express.
    """
    file = directory / CONFIG_FILE
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{directory} has no {CONFIG_FILE}: name the directory of a Hugging Face model, as save_pretrained or the "
            "hub makes it"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy it anew") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{file} is no JSON object; copy it anew")
    keys = Keys(file, given)
    model_type = keys.text("model_type")
    if model_type not in MODEL_TYPES:
        keys.refuse("model_type", f"one of {', '.join(MODEL_TYPES)}")
    for key in ("quantization_config", "auto_map"):
        keys.require(key, None, "full-precision weights of an architecture of transformers itself")
    section, notes = _gpt2(keys) if model_type == "gpt2" else _decoder(keys, model_type)
    unread = tuple(sorted(set(given) - keys.read - NOT_ARCHITECTURE))
    tokens = {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if given.get(key) is not None}
    return Architecture(model_type, section, section["vocab_size"], tokens, tuple(notes), unread)


@dataclass
class Keys:
    """The keys of one file, read strictly; ``read`` remembers which."""

    file: Path
    given: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        self.read.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.get(key, default)
        return value if isinstance(value, str) else self.refuse(key, "a string")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        return value if type(value) is int and value > 0 else self.refuse(key, "a positive whole number")

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is not negative."""
        value = self.get(key, default)
        return float(value) if type(value) in (int, float) and value >= 0 else self.refuse(key, "a number of 0 or more")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self.refuse(key, "true or false")

    def require(self, key: str, value: Any, expected: str) -> None:
        """Refuse any other value than this one."""
        if self.get(key, value) != value:
            self.refuse(key, expected)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Name the key, its value and what it must be.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{self.file}: {key} = {json.dumps(self.given.get(key))} is not supported; it must be {expected}. Convert "
            "a model that has it"
        )


def _decoder(keys: Keys, model_type: str) -> tuple[dict[str, Any], list[str]]:
    """Llama and the models of its family."""
    keys.require("hidden_act", "silu", "silu")
    keys.require("rope_interleaved", False, "false")
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", 8 if model_type in ("mistral", "mixtral") else heads)
    head_dim = keys.integer("head_dim", 128 if model_type == "qwen3" else max(1, hidden // heads))
    if keys.given.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        keys.refuse("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    if heads % groups:
        keys.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    positions = keys.integer("max_position_embeddings")
    limit, notes = _attention_window(keys, model_type, positions)
    section = {
        "num_layers": keys.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "seq_length": min(limit, LONGEST_SAMPLE),
        "max_position_embeddings": limit,
        "vocab_size": keys.integer("vocab_size"),
        "position_embedding_type": "rope",
        **_rope(keys, 1e6 if model_type == "mixtral" else 1e4),
        "normalization": "RMSNorm",
        "layernorm_epsilon": keys.number("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6),
        "swiglu": True,
        "add_bias_linear": _all_biases(keys, model_type),
        "add_qkv_bias": model_type == "qwen2",
        "qk_layernorm": model_type == "qwen3",
        "untie_embeddings_and_output_weights": not keys.flag("tie_word_embeddings", False),
        "attention_dropout": keys.number("attention_dropout", 0.0),
        "init_method_std": keys.number("initializer_range", 0.02) or 0.02,
    }
    if model_type == "mixtral":
        section |= {
            "num_moe_experts": keys.integer("num_local_experts", 8),
            "moe_router_topk": keys.integer("num_experts_per_tok", 2),
        }
    return section, notes


def _all_biases(keys: Keys, model_type: str) -> bool:
    """Llama has biases in every linear layer or in none; attention alone is what our section has no word for."""
    attention, mlp = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    if model_type != "llama" and attention:
        keys.refuse("attention_bias", "false")
    if attention != mlp:
        keys.refuse("attention_bias", f"equal to mlp_bias, {json.dumps(mlp)}")
    return attention


def _attention_window(keys: Keys, model_type: str, positions: int) -> tuple[int, list[str]]:
    """Positions up to which full attention is what the model computes, and a note where that is fewer than it has."""
    types = keys.get("layer_types", [])
    if other := sorted(set(map(str, types)) - {"full_attention", "sliding_attention"}):
        keys.refuse("layer_types", f"full_attention and sliding_attention alone, not {', '.join(other)}")
    keys.read.add("sliding_window")
    window = keys.given.get("sliding_window", 4096 if model_type == "mistral" else None)
    if model_type in ("qwen2", "qwen3") and not keys.flag("use_sliding_window", False):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        keys.refuse("sliding_window", "null or a positive whole number")
    if window is None or window >= positions:
        return positions, []
    return window, [
        f"sliding_window is {window} and this program attends to everything: model.max_position_embeddings is "
        f"{window}, up to which both are the same, instead of {positions}."
    ]


def _rope(keys: Keys, default_theta: float) -> dict[str, Any]:
    """The rotary embedding: plain, or with Llama 3's scaling."""
    name = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    keys.read |= {"rope_parameters", "rope_scaling"}
    given = keys.get(name, {})
    if not isinstance(given, dict):
        keys.refuse(name, "an object")
    parameters = Keys(keys.file, {f"{name}.{key}": value for key, value in given.items()})
    kind = parameters.get(f"{name}.rope_type", parameters.get(f"{name}.type", "default"))
    if kind not in ("default", "llama3"):
        parameters.refuse(f"{name}.rope_type" if "rope_type" in given else f"{name}.type", "default or llama3")
    parameters.require(f"{name}.partial_rotary_factor", 1.0, "1.0")
    keys.require("partial_rotary_factor", 1.0, "1.0")
    theta = parameters.number(f"{name}.rope_theta", keys.number("rope_theta", default_theta))
    rotary: dict[str, Any] = {"rotary_base": theta, "rotary_percent": 1.0, "use_rope_scaling": kind == "llama3"}
    if kind == "llama3":
        for key, value in LLAMA3_SCALING.items():
            parameters.require(f"{name}.{key}", value, str(value))
        rotary["rope_scaling_factor"] = parameters.number(f"{name}.factor")
    if unknown := sorted(set(parameters.given) - parameters.read):
        parameters.refuse(unknown[0], "absent")
    return rotary


def _gpt2(keys: Keys) -> tuple[dict[str, Any], list[str]]:
    """GPT-2."""
    activation = keys.text("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        keys.refuse("activation_function", "gelu_new or gelu")
    for key, value in (
        ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False),
    ):  # fmt: skip
        keys.require(key, value, json.dumps(value))
    hidden, heads = keys.integer("n_embd", 768), keys.integer("n_head", 12)
    if hidden % heads:
        keys.refuse("n_head", f"a divisor of n_embd, {hidden}")
    dropout = keys.number("resid_pdrop", 0.1)
    if keys.number("embd_pdrop", 0.1) != dropout:
        keys.refuse("embd_pdrop", f"equal to resid_pdrop, {dropout}")
    positions = keys.integer("n_positions", 1024)
    section = {
        "num_layers": keys.integer("n_layer", 12),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.integer("n_inner", 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "seq_length": min(positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "vocab_size": keys.integer("vocab_size", 50257),
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "layernorm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
        "swiglu": False,
        "openai_gelu": activation != "gelu",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": not keys.flag("tie_word_embeddings", True),
        "attention_dropout": keys.number("attn_pdrop", 0.1),
        "hidden_dropout": dropout,
        "init_method_std": keys.number("initializer_range", 0.02) or 0.02,
    }
    return section, []
