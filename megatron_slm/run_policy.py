"""The other models of a run: critic, reference, teacher; and where the steps of such a run come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.model.ending import Ending, HiddenStates, Scalar, TokenScores
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.run_model import build_frozen
from megatron_slm.run_parts import Run
from megatron_slm.run_rollouts import Maker, evaluation_of_answers, group_size_of, rollouts_of, sampling_of
from megatron_slm.run_stage import scored_vocabulary
from megatron_slm.stages import ppo
from megatron_slm.stages.critic import NAME as CRITIC, Critic
from megatron_slm.stages.experience import Judge, Sampler
from megatron_slm.stages.reference import Frozen
from megatron_slm.stages.rollouts import NAME as ROLLOUT, Rollouts
from megatron_slm.train import checkpoint, parents, recovery
from megatron_slm.train.hook import Part
from megatron_slm.train.parents import Parent
from megatron_slm.train.saved_state import read_state
from megatron_slm.train.step import StepInput

BuildTrained = Callable[[RunConfig, Ending | Scalar], Any]
"""Wrapped chunks with an optimizer, laid out as the run's own."""


def own_parts(config: RunConfig, device: torch.device, groups: Any, build: BuildTrained) -> dict[str, Part]:
    """What such a run's checkpoint holds beside the policy: the rollout in hand, the critic."""
    if config.stage not in ("ppo", "grpo"):
        return {}
    parts: dict[str, Part] = {ROLLOUT: rollouts_of(config, device)}
    if config.stage == "ppo":
        parts[CRITIC] = _critic(config, groups, build)
    return parts


def _critic(config: RunConfig, groups: Any, build: BuildTrained) -> Critic:
    peak = config.optimizer.lr
    rate = config.ppo.ppo_critic_lr or peak
    # Its own rate, so that its groups keep their ratio to it.
    own = replace(config, optimizer=replace(config.optimizer, lr=rate))
    built = build(own, Scalar())
    source = config.ppo.ppo_critic_checkpoint or config.checkpoint.pretrained_checkpoint
    if source is not None:
        checkpoint.load_weights(recovery.find(Path(source)).path, built.chunks, built.optimizer)
    return Critic(
        built.chunks,
        built.optimizer,
        loss=lambda output, batch: ppo.value_loss(output, batch, config=config.ppo, cp=groups.cp),
        logged=ppo.VALUE_LOGGED,
        peak=rate,
        # A policy that stands still has a schedule without a shape.
        scale=rate / peak if peak else None,
    )


class Policy:
    """A run that learns from its own answers: its steps, and the evaluation of its answers. Collective.

    Args:
        judge: scores answers.
        reward_names: of the parts of a score.
    """

    def __init__(self, run: Run, judge: Judge, reward_names: tuple[str, ...]) -> None:
        config = run.resolved.config
        critic = run.state.parts.get(CRITIC)
        write = run.log.beside_step if run.log is not None else None
        if isinstance(critic, Critic):
            critic.attach(run.plan, write)
        sampler = Sampler(
            run.state.chunks,
            sampling_of(config, run.data.tokenizer),
            group_size_of(config),
            run.vocab_size,
            config.rollout.batch_size,
        )
        priced = config.ppo.ppo_kl_coef if config.stage == "ppo" else config.grpo.grpo_kl_beta
        self._make = Maker(
            config=config,
            data=run.data,
            plan=run.plan,
            state=run.state,
            loader=run.loader,
            sampler=sampler,
            judge=judge,
            reward_names=reward_names,
            reference=starting_model(run) if priced else None,
            critic=critic if isinstance(critic, Critic) else None,
            write=write,
        )
        self._state = run.state
        self._warn = run.log.warn if run.log is not None else None
        self.evaluate = evaluation_of_answers(config, run.data, run.plan, sampler, judge, reward_names)

    def inputs(self) -> Iterator[StepInput]:
        """Steps from wherever the state's cursor stands."""
        rollouts = self._state.parts[ROLLOUT]
        assert isinstance(rollouts, Rollouts), "build_state has made it"
        if rollouts.dropped and self._warn is not None:
            self._warn(rollouts.dropped)
        return rollouts.inputs(self._state, self._make)


def starting_model(run: Run) -> Frozen:
    """The model that the run starts from, frozen, ending as the trained one. Collective; random states stay.

    With adapters it is the trained one itself without them: no second model is built.
    """
    config = run.resolved.config
    if config.lora.lora_rank:
        return Frozen(run.state.chunks, without_adapters=True)
    source = parents.checkpoint_of(run.state.records, parents.PRETRAINED, str(config.checkpoint.pretrained_checkpoint))
    return frozen(run, config, source, TokenScores(scored_vocabulary(config, run.vocab_size)))


def parent_of(run: Run) -> Parent:
    """Which checkpoint :func:`starting_model` is, there or not. Collective."""
    named = str(run.resolved.config.checkpoint.pretrained_checkpoint)
    return parents.noted(run.state.records, parents.PRETRAINED, named)


def teacher_of(run: Run) -> Frozen:
    """The teacher of a distillation, frozen; the student's ending has been given its matrix. Collective.

    Raises:
        ConfigError: it has another vocabulary.
    """
    config = run.resolved.config
    source = parents.checkpoint_of(run.state.records, "distill.distill_teacher", str(config.distill.distill_teacher))
    theirs, tokenizer_hash = load(source / "config.yaml").config, read_state(source).tokenizer_hash
    if tokenizer_hash != run.data.tokenizer.hash:
        raise ConfigError(
            f"distill.distill_teacher = {config.distill.distill_teacher} has another tokenizer "
            f"({tokenizer_hash}) than the data ({run.data.tokenizer.hash}): the same ids mean other text. "
            "Compile the examples with the teacher's tokenizer."
        )
    own = replace(config, model=replace(theirs.model, seq_length=config.model.seq_length), lora=theirs.lora)
    teacher = frozen(run, own, source, HiddenStates())
    ending = getattr(unwrap(run.state.chunks[-1]), "ending", None)
    if (matrix := getattr(ending, "teacher_weight", None)) is not None:
        matrix.take(teacher)
    return teacher


def frozen(run: Run, config: RunConfig, source: Path, ending: Ending | Scalar) -> Frozen:
    """The weights of a checkpoint in bare chunks that have no gradients. Collective; random states stay."""
    random = run.state.random.capture()
    chunks = build_frozen(config, run.plan.groups, run.plan.device, run.vocab_size, ending)
    checkpoint.load_weights(source, chunks)
    run.state.random.restore(random)
    return Frozen(chunks)
