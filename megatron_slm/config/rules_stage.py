"""Rules about stages after pretraining: which sections and options they read, and what they start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.config.run_config import STAGES
from megatron_slm.parallel.layout import nearest_multiples

ROLLOUTS = ("ppo", "grpo", "distill")
REFERENCED = ("dpo", "ppo", "grpo")
"""Stages that may compare with the model they start from."""

ONLY_PRETRAINING = (
    "model.mtp_num_layers",
    "train.z_loss_coefficient",
    "train.label_smoothing",
    "data.reset_attention_mask",
    "data.reset_position_ids",
    "data.eod_mask_loss",
    "data.length_schedule",
    "data.replay_run",
    "data.loss_aware_strength",
)
ONLY_LATER = ("data.pack_rows", "data.train_on", "data.curriculum", "data.curriculum_parts")

SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")
"""Losses of pairs that know of flipped labels."""
MEND = {
    "dpo.dpo_label_smoothing": f"Set dpo.dpo_loss to one of {', '.join(SMOOTHED)}",
    "ppo.ppo_kl_target": "Set ppo.ppo_kl_coef to the price to begin with, above 0",
    "ppo.ppo_kl_horizon": "Set ppo.ppo_kl_target",
    "grpo.grpo_completion_length": "Set grpo.grpo_loss=dr_grpo",
    "grpo.grpo_is_cap": "Set grpo.grpo_is_correction",
    "grpo.grpo_kl_estimator": "Set grpo.grpo_kl_beta above 0",
    "distill.teacher_tail": "Set distill.teacher_topk",
}
"""What gives an option its effect."""


def own_section(facts: Facts) -> Iterator[str]:
    """A section named after a stage belongs to it; rollouts belong to the stages that make some."""
    stage = facts.config.stage
    for section in (*STAGES[1:], "rollout"):
        if section == stage or (section == "rollout" and stage in ROLLOUTS):
            continue
        fields = dataclasses.fields(getattr(facts.config, section))
        given = [key for field in fields if facts.is_set(key := f"{section}.{field.name}")]
        if given:
            owner = section if section != "rollout" else f"one of {', '.join(ROLLOUTS)}"
            yield (
                f"{facts.cite(given[0], 'stage')}: the section {section} would be ignored. Leave it out, or set stage="
                f"{owner}."
            )


def options_of_the_stage(facts: Facts) -> Iterator[str]:
    """Options that the stage does not read."""
    stage = facts.config.stage
    for key in ONLY_LATER if stage == "pretrain" else ONLY_PRETRAINING:
        if facts.is_set(key):
            why = (
                "pretraining reads text, of which every token counts"
                if stage == "pretrain"
                else "its documents are masked, packed and weighted by what the examples say"
            )
            yield f"{facts.cite(key, 'stage')}: the former has no effect, because {why}. Leave it out."


def without_effect(facts: Facts) -> Iterator[str]:
    """Options of the stage's own section that another one leaves without effect."""
    config = facts.config
    dpo, ppo, grpo, distill = config.dpo, config.ppo, config.grpo, config.distill
    idle = {
        ("dpo.dpo_label_smoothing", "dpo.dpo_loss"): dpo.dpo_loss not in SMOOTHED,
        ("ppo.ppo_kl_target", "ppo.ppo_kl_coef"): ppo.ppo_kl_coef == 0,
        ("ppo.ppo_kl_horizon", "ppo.ppo_kl_target"): ppo.ppo_kl_target is None,
        ("grpo.grpo_completion_length", "grpo.grpo_loss"): grpo.grpo_loss != "dr_grpo",
        ("grpo.grpo_is_cap", "grpo.grpo_is_correction"): grpo.grpo_is_correction == "none",
        ("grpo.grpo_kl_estimator", "grpo.grpo_kl_beta"): grpo.grpo_kl_beta == 0,
        ("distill.teacher_tail", "distill.teacher_topk"): distill.teacher_topk is None,
    }
    for (key, other), out in idle.items():
        if out and key.startswith(f"{config.stage}.") and facts.is_set(key):
            yield f"{facts.cite(key, other)}: the former has no effect. {MEND[key]}, or leave it out."
    if config.stage in ("ppo", "grpo"):
        for key in ("data.train_on", "data.pack_rows"):
            if facts.is_set(key):
                yield f"{facts.cite(key, 'stage')}: the former has no effect on prompts. Leave it out."
    if config.stage == "distill" and distill.distill_on_policy_fraction == 0:
        key = "distill.distill_on_policy_fraction"
        for field in dataclasses.fields(config.rollout):
            if facts.is_set(given := f"rollout.{field.name}"):
                yield f"{facts.cite(given, key)}: nothing is drawn. Set {key} above 0, or leave the former out."


def curriculum(facts: Facts) -> Iterator[str]:
    """A curriculum sorts the rows of one source."""
    data, key = facts.config.data, "data.curriculum"
    if data.curriculum is None:
        if facts.is_set("data.curriculum_parts"):
            cited = facts.cite("data.curriculum_parts", key)
            yield f"{cited}: the parts would be ignored. Set {key}, or leave them out."
    elif data.sources or facts.config.stage in ("ppo", "grpo"):
        other = "data.sources" if data.sources else "stage"
        yield f"{facts.cite(key, other)}: a curriculum orders the rows of one data.data_path. Leave one of the two out."


def reference(facts: Facts) -> Iterator[str]:
    """A stage that compares with a reference must know where it comes from."""
    config, path = facts.config, "checkpoint.pretrained_checkpoint"
    compares = config.stage == "dpo" or (config.stage == "ppo" and config.ppo.ppo_kl_coef > 0)
    compares = compares or (config.stage == "grpo" and config.grpo.grpo_kl_beta > 0)
    compares = compares and config.replay.batches_of is None  # what it said was kept with the batches
    if compares and config.checkpoint.pretrained_checkpoint is None:
        yield (
            f"{facts.cite('stage')} compares with the model it starts from, so set {path} to that model's run or "
            "checkpoint."
        )


def whole_sequences(facts: Facts) -> Iterator[str]:
    """What is drawn one token at a time is not cut over ranks."""
    config, degree = facts.config, "parallel.context_parallel_size"
    if config.stage in ROLLOUTS and config.parallel.context_parallel_size > 1:
        yield f"{facts.cite('stage', degree)}: rollouts are drawn by whole sequences. Set {degree}=1."


def rollout_steps(facts: Facts) -> Iterator[str]:
    """A rollout is whole steps, and a step moves the data by whole prompts."""
    config, batch, prompts = facts.config, "train.global_batch_size", "rollout.prompts"
    if config.stage not in ("ppo", "grpo"):
        return
    size, asked = config.train.global_batch_size, config.rollout.prompts
    if asked is not None and asked % size:
        yield (
            f"{facts.cite(prompts, batch)}: a rollout is trained on in whole steps. "
            f"{nearest_multiples(prompts, asked, size)}"
        )
    key = "ppo.ppo_epochs" if config.stage == "ppo" else "grpo.grpo_iterations"
    epochs = config.ppo.ppo_epochs if config.stage == "ppo" else config.grpo.grpo_iterations
    if size % epochs:
        yield (
            f"{facts.cite(key, batch)}: every step of a rollout moves the data by the same number of prompts. "
            f"{nearest_divisors(key, size, epochs)}"
        )
    if not config.rollout.rewards and config.rollout.reward_model is None:
        yield (
            f"{facts.cite('stage')} learns from rewards, and none is named: set rollout.rewards=NAME=WEIGHT or "
            "rollout.reward_model=RUN."
        )


def teacher(facts: Facts) -> Iterator[str]:
    """Distillation has a teacher, running or stored; a stored one has not read what the student draws."""
    own, key, fraction = facts.config.distill, "distill.teacher_topk", "distill.distill_on_policy_fraction"
    if facts.config.stage != "distill":
        return
    if own.distill_teacher is None:
        way_out = "its run or checkpoint" if own.teacher_topk is None else "what `mslm data teacher` wrote"
        yield f"{facts.cite('stage')} needs a teacher: set distill.distill_teacher to {way_out}."
    if own.teacher_topk is not None and own.distill_on_policy_fraction > 0:
        yield (
            f"{facts.cite(key, fraction)}: a stored teacher has not read the answers that the student draws. Set "
            f"{fraction}=0, or leave {key} out, so that the teacher runs."
        )


RULES = (
    curriculum,
    rollout_steps,
    teacher,
    own_section,
    options_of_the_stage,
    without_effect,
    reference,
    whole_sequences,
)
