"""Rules about adapters: what they may stand beside, and what they begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_slm.config.facts import Facts
from megatron_slm.model.config import LORA_TARGETS

RANK, TARGETS = "lora.lora_rank", "lora.lora_targets"


def own_options(facts: Facts) -> Iterator[str]:
    """Without a rank there are no adapters."""
    lora = facts.config.lora
    if lora.lora_rank:
        return
    for field in dataclasses.fields(lora):
        if facts.is_set(key := f"lora.{field.name}"):
            yield f"{facts.cite(key, RANK)}: the former would be ignored. Set {RANK}, or leave {key} out."


def known_targets(facts: Facts) -> Iterator[str]:
    """Each layer is named once."""
    targets = facts.config.lora.lora_targets
    if not targets or len({*targets}) < len(targets) or not {*targets} <= {*LORA_TARGETS}:
        yield f"{facts.cite(TARGETS)}: name one or more of {', '.join(LORA_TARGETS)}, each once."


def beside(facts: Facts) -> Iterator[str]:
    """What has no adapters."""
    config = facts.config
    if not config.lora.lora_rank:
        return
    model, targets = config.model, config.lora.lora_targets
    if model.num_moe_experts is not None and (found := [each for each in targets if each in LORA_TARGETS[2:]]):
        yield (
            f"{facts.cite('model.num_moe_experts', RANK)}: experts have no adapters, but {TARGETS} names "
            f"{', '.join(found)}. Set {TARGETS}=linear_qkv,linear_proj."
        )
    if model.multi_latent_attention and "linear_qkv" in targets:
        yield (
            f"{facts.cite('model.multi_latent_attention', RANK)}: the projections of latents have no adapters, but "
            f"{TARGETS} names linear_qkv. Leave it out of {TARGETS}."
        )
    if model.mtp_num_layers is not None:
        yield (
            f"{facts.cite('model.mtp_num_layers', RANK)}: the layers of multi-token prediction have no adapters and "
            f"would not be trained. Set {RANK}=0, or leave model.mtp_num_layers out."
        )


def frozen_weights(facts: Facts) -> Iterator[str]:
    """Frozen weights come from somewhere."""
    key = "checkpoint.pretrained_checkpoint"
    if facts.config.lora.lora_rank and facts.config.checkpoint.pretrained_checkpoint is None:
        yield (
            f"{facts.cite(RANK, key)}: adapters are trained beside frozen weights, which would be random. Set {key} to "
            f"the run or checkpoint that they come from, or {RANK}=0."
        )


RULES = (own_options, known_targets, beside, frozen_weights)
