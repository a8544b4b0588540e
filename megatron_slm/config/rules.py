"""The rules that hold across sections. All of them are checked, and every violation is one sentence or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from megatron_slm.config import (
    rules_context,
    rules_data,
    rules_dynamics,
    rules_experts,
    rules_fp8,
    rules_latent,
    rules_layout,
    rules_lora,
    rules_packages,
    rules_profile,
    rules_replay,
    rules_stage,
    rules_training,
)
from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import nearest_multiples

Rule = Callable[[Facts], Iterator[str]]

_LONGEST_NAME_BYTES = 200
"""Most file systems end at 255; what is left belongs to the suffixes that a run's directory gets."""


def violations(
    config: RunConfig, world_size: int | None = None, *, provenance: Mapping[str, str] | None = None
) -> list[str]:
    """Every rule that ``config`` breaks.

    Args:
        config: a resolved configuration.
        world_size: ranks that were really started; ``None`` takes ``parallel.world_size``, then the fewest possible.
        provenance: source of each value (``Resolved.provenance``), named in the sentences.

    Returns:
        One text for each violation: the keys with values and sources, the rule, the nearest valid values.
    """
    expected = config.parallel.world_size
    facts = Facts(config, world_size or expected or config.parallel.smallest_world_size, provenance or {})
    found = []
    if world_size is not None and expected is not None and world_size != expected:
        found.append(
            f"{facts.cite('parallel.world_size')}, but the launcher started {world_size} ranks. "
            "Start as many as the configuration says, or leave parallel.world_size out."
        )
    for rule in RULES:
        found += rule(facts)
    return found


def require(config: RunConfig, world_size: int | None = None, *, provenance: Mapping[str, str] | None = None) -> None:
    """Refuse a configuration that breaks a rule.

    Raises:
        ConfigError: the message lists every violation.
    """
    if found := violations(config, world_size, provenance=provenance):
        raise ConfigError("\n".join(found))


def run_name(facts: Facts) -> Iterator[str]:
    """The run's name is one directory."""
    name = facts.config.name
    if name is not None and ("/" in name or name.startswith(".") or name != name.strip()):
        yield (
            f"{facts.cite('name')} must be the name of one directory, without slashes, leading dots or outer spaces. "
            "Choose where runs are kept with log.runs_dir."
        )
    length = 0 if name is None else len(name.encode("utf-8", "surrogatepass"))
    if length > _LONGEST_NAME_BYTES:
        yield (
            f"{facts.cite('name')} is {length} bytes long; a run's directory is named by at most {_LONGEST_NAME_BYTES} "
            "characters (bytes of UTF-8). Choose a shorter name."
        )


def head_shape(facts: Facts) -> Iterator[str]:
    """Heads divide the width, groups divide the heads."""
    model = facts.config.model
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and not model.multi_latent_attention and model.hidden_size % heads:
        yield (
            f"{facts.cite('model.hidden_size', 'model.num_attention_heads')}: the width must divide evenly over the "
            "heads. "
            f"{nearest_multiples('model.hidden_size', model.hidden_size, heads)} "
            f"{nearest_divisors('model.num_attention_heads', model.hidden_size, heads)} Or set model.kv_channels."
        )
    if heads % groups:
        yield (
            f"{facts.cite('model.num_attention_heads', 'model.num_query_groups')}: every key/value head serves the "
            "same "
            f"number of query heads. {nearest_divisors('model.num_query_groups', heads, groups)}"
        )


def activation(facts: Facts) -> Iterator[str]:
    """openai_gelu is a GELU, swiglu is none."""
    if facts.config.model.openai_gelu and facts.config.model.swiglu:
        yield (
            f"{facts.cite('model.openai_gelu', 'model.swiglu')} exclude each other: the MLP has one activation. "
            "Set model.swiglu=false for GPT-2's tanh GELU, or model.openai_gelu=false."
        )


def rotary_embedding(facts: Facts) -> Iterator[str]:
    """The rotary options belong to rotary positions, and rotate pairs of channels."""
    model = facts.config.model
    kind = "model.position_embedding_type"
    if model.position_embedding_type != "rope":
        for key in ("model.rotary_base", "model.rotary_percent", "model.use_rope_scaling", "model.rope_scaling_factor"):
            if facts.is_set(key):
                yield (
                    f"{facts.cite(key, kind)}: the former has an effect with rope only. Leave it out, or set "
                    f"{kind}=rope."
                )
        return
    if facts.is_set("model.rope_scaling_factor") and not model.use_rope_scaling:
        yield (
            f"{facts.cite('model.rope_scaling_factor', 'model.use_rope_scaling')}: the factor would be ignored. "
            "Set model.use_rope_scaling=true, or leave the factor out."
        )
    if model.multi_latent_attention:
        return  # rules_latent speaks of its channels
    rotated = int(model.head_dim * model.rotary_percent)
    if rotated % 2 or not rotated:
        yield (
            f"{facts.cite('model.rotary_percent')} of head dimension {model.head_dim} is {rotated} channels; rope "
            "rotates "
            "pairs, so it must be an even number of at least 2. Change model.rotary_percent, or model.kv_channels."
        )


def position_limit(facts: Facts) -> Iterator[str]:
    """A sample fits the positions."""
    model = facts.config.model
    if model.position_embedding_type != "none" and model.seq_length > model.position_limit:
        reason = {
            "learned_absolute": "there is one learned vector for each position",
            "rope": "the positions are defined up to that length",
        }[model.position_embedding_type]
        yield (
            f"{facts.cite('model.seq_length', 'model.max_position_embeddings')}: a sample is longer than the "
            "positions; "
            f"{reason}. Largest valid model.seq_length: {model.position_limit}."
        )


def document_positions(facts: Facts) -> Iterator[str]:
    """Restarting positions means something where the model can see it."""
    data, kind = facts.config.data, facts.config.model.position_embedding_type
    if not data.reset_position_ids:
        return
    cited = facts.cite("data.reset_position_ids", "model.position_embedding_type")
    if kind == "none":
        yield f"{cited}: a model without positions cannot restart them. Set data.reset_position_ids=false."
    elif kind == "rope" and not data.reset_attention_mask:
        yield (
            f"{cited}: rope sees distances only, so a restart has a meaning inside documents alone, but "
            f"{facts.cite('data.reset_attention_mask')} lets tokens attend across them. Set "
            "data.reset_attention_mask=true, "
            "or data.reset_position_ids=false."
        )


RULES: tuple[Rule, ...] = (
    run_name,
    head_shape,
    activation,
    rotary_embedding,
    position_limit,
    document_positions,
    *rules_data.RULES,
    *rules_layout.RULES,
    *rules_context.RULES,
    *rules_experts.RULES,
    *rules_latent.RULES,
    *rules_training.RULES,
    *rules_fp8.RULES,
    *rules_dynamics.RULES,
    *rules_profile.RULES,
    *rules_replay.RULES,
    *rules_stage.RULES,
    *rules_lora.RULES,
    *rules_packages.RULES,
)
