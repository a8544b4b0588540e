"""What the stage of a run gives to the loop: the model's ending, the loss, and the step inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.loader import RowLoader
from megatron_slm.data.loader import TrainLoader
from megatron_slm.model.ending import Ending, Scalar, TokenDivergence, TokenScores
from megatron_slm.parallel.pipeline import Batch, LossFunction
from megatron_slm.parallel.vocab_scores import Vocabulary
from megatron_slm.run_reference import PairReference
from megatron_slm.stages import distill, dpo, grpo, ppo, pretrain, reward, sft
from megatron_slm.stages.config import GrpoConfig
from megatron_slm.stages.reference import Frozen
from megatron_slm.stages.teacher import TeacherMatrix, add_hidden
from megatron_slm.train.step import StepInput, StepPlan, TrainState

if TYPE_CHECKING:
    from megatron_slm.run_policy import Policy


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
    return Vocabulary(vocab_size, config.rollout.temperature if config.stage in ("ppo", "grpo") else 1.0)


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


class Beside(NamedTuple):
    """The other models of a run, as far as its stage has any.

    Attributes:
        pairs: what DPO compares with.
        teacher: of a distillation.
        policy: answers and judges, of PPO and GRPO.
    """

    pairs: PairReference | None = None
    teacher: Frozen | None = None
    policy: Policy | None = None


def stage_inputs(
    loader: RowLoader | TrainLoader,
    state: TrainState,
    plan: StepPlan,
    *,
    batch_size: Callable[[int], int],
    beside: Beside,
) -> Iterator[StepInput]:
    """Global batches of given data from wherever the state's cursor stands. Collective.

    Args:
        batch_size: samples of the global batch that begins after so many samples.
    """
    complete = partial(_complete_pairs, beside.pairs, loader) if beside.pairs is not None else None
    for inputs in pretrain.step_inputs(loader, state, batch_size, plan, complete=complete):
        if beside.pairs is not None:
            beside.pairs.complete_live(inputs.micro_batches)
        if beside.teacher is not None:
            add_hidden(beside.teacher, inputs.micro_batches, plan)
        yield inputs


def _complete_pairs(
    pairs: PairReference, loader: RowLoader | TrainLoader, batches: list[Batch], cursor: Cursor
) -> None:
    """Fields of the pairs in the whole micro-batches of the step that begins at ``cursor``."""
    rows = [
        [cursor.order.sample_id(at) for at in loader.positions(number, cursor.consumed_samples)]
        for number in range(len(batches))
    ]
    pairs.complete(batches, [[(one.source, one.index) for one in row] for row in rows])
