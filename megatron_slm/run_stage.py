"""What the stage of a run gives to the loop: the model's ending, the loss, and the step inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.ending import Ending, Scalar, TokenDivergence, TokenScores
from megatron_slm.parallel.pipeline import LossFunction
from megatron_slm.parallel.vocab_scores import Vocabulary
from megatron_slm.stages import distill, dpo, grpo, ppo, pretrain, reward, sft
from megatron_slm.stages.config import GrpoConfig
from megatron_slm.stages.teacher import TeacherMatrix

if TYPE_CHECKING:
    pass


class StageLoss(NamedTuple):
    """The loss of a stage, and the names of what it logs, the loss itself first."""

    function: LossFunction
    logged: tuple[str, ...]


def ending_of(config: RunConfig, vocab_size: int) -> Ending | Scalar:
    """How the trained model ends."""
    if config.stage == "pretrain":
        return pretrain.ending(config.train, vocab_size)
    if config.stage == "reward":
        return Scalar(config.reward.reward_head_init_std)
    if config.stage == "distill":
        vocabulary = Vocabulary(vocab_size, config.distill.distill_temperature)
        if config.distill.teacher_topk is not None:
            return TokenScores(vocabulary)
        return TokenDivergence(vocabulary, config.distill.distill_beta, TeacherMatrix())
    return TokenScores(scored_vocabulary(config, vocab_size))


def scored_vocabulary(config: RunConfig, vocab_size: int) -> Vocabulary:
    """Labels are scored at the temperature they were drawn at."""
    return Vocabulary(vocab_size, config.rollout.sampling_temperature if config.stage in ("ppo", "grpo") else 1.0)


def loss_of(config: RunConfig, groups: Any) -> StageLoss:
    """What the stage minimises."""
    cp = groups.cp
    match config.stage:
        case "sft":
            return StageLoss(partial(sft.loss, config=config.sft, cp=cp), sft.logged(config.sft))
        case "reward":
            return StageLoss(partial(reward.loss, config=config.reward, cp=cp), reward.LOGGED)
        case "dpo":
            return StageLoss(partial(dpo.loss, config=config.dpo, cp=cp), dpo.logged(config.dpo))
        case "grpo":
            return StageLoss(partial(grpo.loss, config=group_config(config), cp=cp), grpo.logged(config.grpo))
        case "ppo":
            return StageLoss(partial(ppo.loss, config=config.ppo, cp=cp), ppo.LOGGED)
        case "distill" if config.distill.teacher_topk is not None:
            return StageLoss(partial(distill.stored_loss, config=config.distill, cp=cp), distill.STORED_LOGGED)
        case "distill":
            return StageLoss(partial(distill.loss, config=config.distill, cp=cp), distill.LOGGED)
    return StageLoss(pretrain.loss_function(config.train, config.model), pretrain.logged(config.train, config.model))


def group_config(config: RunConfig) -> GrpoConfig:
    """GRPO's section with the length that dr_grpo divides by filled in."""
    length = config.grpo.grpo_completion_length or config.rollout.max_new_tokens
    return replace(config.grpo, grpo_completion_length=length)
