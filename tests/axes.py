"""The axes that layouts, models and schedules can differ on, as a small configuration, and what cannot stand together.

A case is possible when ``config.rules`` accept it, it has ``RANKS`` ranks, and every value in it has an effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_slm.config import rules
from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel.config import ParallelConfig
from tests.covering import Case, Space

RANKS = 4
VOCAB = 500  # not a multiple of 128: the padding rows of the embedding must stay out of the loss

PLAIN: dict[str, Any] = {
    "parallel.device": "cpu",
    "precision.fp64": True,
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 48,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.seq_length": 16,
    "model.vocab_size": VOCAB,
    "optimizer.lr": 1e-3,
    "optimizer.clip_grad": 0.0,
}

LATENT = {
    "model.multi_latent_attention": True,
    "model.num_query_groups": None,
    "model.q_lora_rank": 12,
    "model.kv_lora_rank": 8,
    "model.qk_head_dim": 8,
    "model.qk_pos_emb_head_dim": 4,
    "model.v_head_dim": 8,
}
EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.moe_router_topk": 2,
    "model.moe_router_load_balancing_type": "aux_loss",
    "model.moe_aux_loss_coeff": 1e-2,
    "model.moe_z_loss_coeff": 1e-3,
    "model.moe_first_dense_layers": 1,
}
CAPACITY = {"model.moe_expert_capacity_factor": 1.0}
SHARED = {
    "model.moe_shared_expert_intermediate_size": 24,
    "model.moe_router_score_function": "sigmoid",
    "model.moe_router_enable_expert_bias": True,
    "model.moe_router_load_balancing_type": "seq_aux_loss",
}
SELECTIVE = {"train.recompute_granularity": "selective"}
FULL = {"train.recompute_granularity": "full", "train.recompute_num_layers": 1}

VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "tp": {size: {"parallel.tensor_model_parallel_size": int(size)} for size in "124"},
    "pp": {size: {"parallel.pipeline_model_parallel_size": int(size)} for size in "124"},
    "vpp": {"1": {}, "2": {"parallel.virtual_pipeline_model_parallel_size": 2}},
    "cp": {size: {"parallel.context_parallel_size": int(size)} for size in "124"},
    "ep": {size: {"parallel.expert_model_parallel_size": int(size)} for size in "124"},
    "etp": {"tp": {}, "1": {"parallel.expert_tensor_parallel_size": 1}},
    "dp": {size: {} for size in "124"},
    "sp": {"off": {}, "on": {"parallel.sequence_parallel": True}},
    "recompute": {
        "none": {},
        "attention": SELECTIVE | {"train.recompute_modules": ("core_attn",)},
        "mlp": SELECTIVE | {"train.recompute_modules": ("mlp",)},
        "experts": SELECTIVE | {"train.recompute_modules": ("moe",)},
        "shared": SELECTIVE | {"train.recompute_modules": ("shared_experts",)},
        "latents": SELECTIVE | {"train.recompute_modules": ("mla_up_proj",)},
        "uniform": FULL | {"train.recompute_method": "uniform"},
        "block": FULL | {"train.recompute_method": "block"},
    },
    "embeddings": {"untied": {}, "tied": {"model.untie_embeddings_and_output_weights": False}},
    "optimizer": {"distributed": {}, "replicated": {"parallel.use_distributed_optimizer": False}},
    "samples": {"1": {}, "2": {}},
    "accumulation": {"4": {}, "1": {}},
    "gather": {"at_once": {}, "overlapped": {"parallel.overlap_param_gather": True}},
    "documents": {"whole": {}, "packed": {"data.reset_attention_mask": True}},
    "objective": {
        "plain": {},
        "smoothed": {"train.z_loss_coefficient": 1e-3, "train.label_smoothing": 0.1},
    },
    "clipping": {"off": {}, "on": {"optimizer.clip_grad": 0.1}},
    "positions": {"rotary": {}, "learned": {"model.position_embedding_type": "learned_absolute"}},
    "layer": {
        "llama": {},
        "gpt2": {"model.normalization": "LayerNorm", "model.swiglu": False, "model.openai_gelu": True},
    },
    "biases": {"none": {}, "qkv": {"model.add_qkv_bias": True}, "all": {"model.add_bias_linear": True}},
    "attention": {"grouped": {}, "latent": LATENT},
    "mlp": {"dense": {}, "experts": EXPERTS, "capacity": EXPERTS | CAPACITY, "shared": EXPERTS | SHARED},
    "mtp": {"0": {}, "1": {"model.mtp_num_layers": 1}},
    "dispatcher": {"alltoall": {}, "allgather": {"parallel.moe_token_dispatcher_type": "allgather"}},
    "exchange": {"p2p": {}, "all_gather": {"parallel.cp_comm_type": "all_gather"}},
}
"""Axis -> value -> what it sets. The first value of each axis is the plain one."""

AXES = {axis: tuple(values) for axis, values in VALUES.items()}


def config_of(case: Case) -> RunConfig:
    """The case as a configuration, with the number of its ranks."""
    values: dict[str, Any] = dict(PLAIN)
    for axis, value in case:
        values |= VALUES[axis][value]
    chosen = dict(case)
    values["parallel.world_size"] = world_size(case)
    samples = int(chosen["samples"])
    values["train.micro_batch_size"] = samples
    values["train.global_batch_size"] = samples * int(chosen["accumulation"]) * int(chosen["dp"])
    return with_values(values)


def one_rank(config: RunConfig) -> RunConfig:
    """The same model and batches on one rank, nothing recomputed."""
    parallel = ParallelConfig(device=config.parallel.device, world_size=1)
    train = dataclasses.replace(
        config.train, recompute_granularity=None, recompute_method=None, recompute_num_layers=None
    )
    return dataclasses.replace(config, parallel=parallel, train=train)


def with_values(values: Mapping[str, Any]) -> RunConfig:
    """The default configuration with ``values`` by dotted keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    default = RunConfig()
    changed = {name: dataclasses.replace(getattr(default, name), **part) for name, part in sections.items()}
    return dataclasses.replace(default, **changed)


def case(**values: str) -> Case:
    """The plain case with other values on some axes."""
    return tuple((axis, values.get(axis, choices[0])) for axis, choices in AXES.items())


def world_size(case: Case) -> int:
    """Ranks of a case."""
    chosen = dict(case)
    return int(chosen["tp"]) * int(chosen["pp"]) * int(chosen["cp"]) * int(chosen["dp"])


def fits(case: Case) -> bool:
    """Whether a case is for exactly ``RANKS`` ranks: each then has two axes of several ranks, or one of four."""
    return world_size(case) == RANKS


def reasons(case: Case) -> list[str]:
    """Why a case is impossible."""
    chosen = dict(case)
    idle = ["etp 1 is what tp 1 has anyway"] if chosen["etp"] == "1" and chosen["tp"] == "1" else []
    return idle + rules.violations(config_of(case), world_size(case))


SPACE = Space(AXES, enabling=("tp", "pp", "cp", "dp", "etp", "sp", "mlp", "attention"), fits=fits, reasons=reasons)
"""What the matrix is drawn from."""

EXCLUDED: dict[str, tuple[str, ...]] = {
    "more ranks than there are": (
        *(f"{one} 4 with {other} {size}" for one, other in (("cp", "dp"), ("cp", "pp"), ("cp", "tp")) for size in "24"),
        *(f"{one} 4 with {other} {size}" for one, other in (("dp", "pp"), ("dp", "tp"), ("pp", "tp")) for size in "24"),
        *(f"{one} 2 with {other} 4" for one, other in (("cp", "dp"), ("cp", "pp"), ("cp", "tp"))),
        *(f"{one} 2 with {other} 4" for one, other in (("dp", "pp"), ("dp", "tp"), ("pp", "tp"))),
        "ep 4 with pp 2",
        "ep 2 with pp 4",
        "ep 4 with pp 4",
        "ep 4 with vpp 2",
        *(f"{axis} 4 with vpp 2" for axis in ("tp", "cp", "dp")),
        *(f"exchange all_gather with {axis} 4" for axis in ("tp", "pp")),
        "dp 4 with exchange all_gather",
        *("pp 4 with sp on", "cp 4 with sp on", "dp 4 with sp on"),
        *("etp 1 with pp 4", "cp 4 with etp 1", "dp 4 with etp 1"),
    ),
    "interleaving needs a pipeline, twice as many layers, and micro-batches in groups of pp": (
        "pp 1 with vpp 2",
        "pp 4 with vpp 2",
        "accumulation 1 with vpp 2",
    ),
    "sequence parallelism needs tp, and experts with tp need sequence parallelism": (
        "sp on with tp 1",
        "etp 1 with tp 1",
        "etp 1 with sp off",
    ),
    "options of what is not there": (
        "cp 1 with exchange all_gather",
        *("ep 2 with mlp dense", "ep 4 with mlp dense", "etp 1 with mlp dense", "dispatcher allgather with mlp dense"),
        "gather overlapped with optimizer replicated",
        *("mlp dense with recompute experts", "mlp dense with recompute shared"),
        *("mlp experts with recompute shared", "mlp capacity with recompute shared"),
        "attention grouped with recompute latents",
    ),
    "core 0.16.1 never ends the backward pass of a recomputed MLP with biases": ("biases all with recompute mlp",),
    "core 0.16.1 adds up the gradients of an expert's output bias over tp ranks": (
        *("biases all with mlp experts", "biases all with mlp capacity", "biases all with mlp shared"),
        *(
            "biases all with ep 2",
            "biases all with ep 4",
            "biases all with etp 1",
            "biases all with dispatcher allgather",
            "biases all with recompute experts",
            "biases all with recompute shared",
        ),
    ),
    "core 0.16.1 recomputes no layer of multi-token prediction by blocks": ("mtp 1 with recompute block",),
    "latent attention rotates, and its projections have no biases": (
        "attention latent with positions learned",
        "attention latent with biases qkv",
        "positions learned with recompute latents",
        "biases qkv with recompute latents",
    ),
    "later tokens would be embedded at the positions of earlier ones": ("mtp 1 with positions learned",),
}
"""Pairs that no case holds, by the reason: what ``config.rules`` refuse, and what four ranks do not hold."""
