"""Rules about multi-latent attention and multi-token prediction: what core 0.16.1 asserts, ignores or gets wrong."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.parallel.layout import nearest_multiples

MLA = "model.multi_latent_attention"
MTP = "model.mtp_num_layers"
ROPE_TYPE = "model.rope_type"
POSITIONS = "model.position_embedding_type"
TP = "parallel.tensor_model_parallel_size"

_LATENT_ONLY = (
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_head_dim",
    "model.qk_pos_emb_head_dim",
    "model.v_head_dim",
    ROPE_TYPE,
)
_YARN_ONLY = (
    "model.rotary_scaling_factor",
    "model.original_max_position_embeddings",
    "model.mscale",
    "model.mscale_all_dim",
)
_WITHOUT_LATENTS = {
    "model.kv_channels": "heads have model.qk_head_dim + model.qk_pos_emb_head_dim and model.v_head_dim channels",
    "model.add_qkv_bias": "its projections have no biases",
    "model.use_rope_scaling": "its positions are scaled by model.rope_type=yarn",
}


def latent_options(facts: Facts) -> Iterator[str]:
    """The options of latent attention belong to it, those of ordinary attention to that."""
    model = facts.config.model
    if not model.multi_latent_attention:
        for key in (*_LATENT_ONLY, *_YARN_ONLY):
            if facts.is_set(key):
                yield f"{facts.cite(key, MLA)}: the former would be ignored. Leave it out, or set {MLA}=true."
        return
    for key, reason in _WITHOUT_LATENTS.items():
        if facts.is_set(key):
            yield f"{facts.cite(key, MLA)}: the former would be ignored, {reason}. Leave it out, or set {MLA}=false."
    if model.query_groups != model.num_attention_heads:
        yield (
            f"{facts.cite('model.num_query_groups', MLA)}: every head makes keys and values of its own from the shared "
            f"latent. Leave model.num_query_groups out, or set it to {model.num_attention_heads}."
        )


def latent_positions(facts: Facts) -> Iterator[str]:
    """Latent attention rotates a part of each head by itself, by the frequencies of its rope_type."""
    model = facts.config.model
    if not model.multi_latent_attention:
        return
    if model.position_embedding_type != "rope":
        yield (
            f"{facts.cite(POSITIONS, MLA)}: latent attention always rotates its {model.qk_pos_emb_head_dim} positional "
            f"channels, whatever the former says. Set {POSITIONS}=rope."
        )
    rotated = int(model.qk_pos_emb_head_dim * model.rotary_percent)
    if rotated % 2 or not rotated:
        yield (
            f"{facts.cite('model.qk_pos_emb_head_dim', 'model.rotary_percent')} make {rotated} rotated channels; rope "
            "rotates pairs, so it must be an even number of at least 2. Change one of them."
        )
    if model.rope_type == "yarn":
        if facts.is_set("model.rotary_percent"):
            yield (
                f"{facts.cite('model.rotary_percent', ROPE_TYPE)}: YaRN rotates all positional channels and would "
                f"ignore the former. Leave it out, or set {ROPE_TYPE}=rope."
            )
        return
    for key in _YARN_ONLY:
        if facts.is_set(key):
            yield f"{facts.cite(key, ROPE_TYPE)}: the former belongs to YaRN. Leave it out, or set {ROPE_TYPE}=yarn."


def latent_division(facts: Facts) -> Iterator[str]:
    """The down projections divide over tp."""
    model, tp = facts.config.model, facts.config.parallel.tensor_model_parallel_size
    if not model.multi_latent_attention:
        return
    rank = model.q_lora_rank
    if rank is not None and rank % tp:
        yield (
            f"{facts.cite('model.q_lora_rank', TP)}: the query latent must divide evenly over tp. "
            f"{nearest_multiples('model.q_lora_rank', rank, tp)} {nearest_divisors(TP, rank, tp)}"
        )
    joint = model.kv_lora_rank + model.qk_pos_emb_head_dim
    if joint % tp:
        yield (
            f"{facts.cite('model.kv_lora_rank', 'model.qk_pos_emb_head_dim', TP)}: the latent and the shared rotary "
            f"key are made together, and their {joint} channels must divide evenly over tp. "
            f"{nearest_divisors(TP, joint, tp)}"
        )


def latent_recompute(facts: Facts) -> Iterator[str]:
    """The up projections of latents are recomputed where there are latents."""
    train, modules = facts.config.train, "train.recompute_modules"
    wanted = train.recompute_granularity == "selective" and "mla_up_proj" in train.recompute_modules
    if wanted and not facts.config.model.multi_latent_attention:
        yield f"{facts.cite(modules, MLA)}: mla_up_proj is a part of the latter. Leave it out, or set {MLA}=true."


def prediction(facts: Facts) -> Iterator[str]:
    """Multi-token prediction: its options, its positions, and room for what it predicts."""
    model, weight = facts.config.model, "model.mtp_loss_scaling_factor"
    if model.mtp_num_layers is None:
        if facts.is_set(weight):
            yield f"{facts.cite(weight, MTP)}: the former would be ignored. Leave it out, or set {MTP} to 1 or more."
        return
    if model.position_embedding_type == "learned_absolute":
        yield (
            f"{facts.cite(MTP, POSITIONS)}: the last pipeline stage would embed later tokens with position vectors of "
            f"its own, which nothing keeps equal to those of the first. Set {POSITIONS}=rope, or leave {MTP} out."
        )
    if model.mtp_num_layers >= model.seq_length:
        yield (
            f"{facts.cite(MTP, 'model.seq_length')}: no position of a sample has so many tokens behind the next one. "
            f"Largest valid {MTP}: {model.seq_length - 1}."
        )


def prediction_recompute(facts: Facts) -> Iterator[str]:
    """Core recomputes a layer of multi-token prediction alone and by the uniform method, or stops."""
    train = facts.config.train
    if facts.config.model.mtp_num_layers is None or train.recompute_granularity != "full":
        return
    method, layers = "train.recompute_method", "train.recompute_num_layers"
    if train.recompute_method == "block":
        yield (
            f"{facts.cite(method, MTP)}: core would recompute no layer of multi-token prediction. Set {method}=uniform "
            f"and {layers}=1, or leave {MTP} out."
        )
    elif train.recompute_num_layers not in (None, 1):
        yield (
            f"{facts.cite(layers, MTP)}: a layer of multi-token prediction is recomputed by itself. Set {layers}=1, or "
            f"leave {MTP} out."
        )


RULES = (
    latent_options,
    latent_positions,
    latent_division,
    latent_recompute,
    prediction,
    prediction_recompute,
)
