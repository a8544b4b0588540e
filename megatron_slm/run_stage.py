"""What the stage of a run gives to the loop: the model's ending, the loss, and the step inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.loader import RowLoader
from megatron_slm.data.loader import TrainLoader
from megatron_slm.model.ending import Ending, Scalar, TokenScores
from megatron_slm.parallel.pipeline import Batch, LossFunction
from megatron_slm.parallel.vocab_scores import Vocabulary
from megatron_slm.run_reference import PairReference
from megatron_slm.stages import dpo, pretrain, reward, sft
from megatron_slm.train.step import StepInput, StepPlan, TrainState


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
    return TokenScores(Vocabulary(vocab_size))


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
    return StageLoss(pretrain.loss_function(config.train, config.model), pretrain.logged(config.train, config.model))


def stage_inputs(
    config: RunConfig,
    loader: RowLoader | TrainLoader,
    state: TrainState,
    plan: StepPlan,
    *,
    batch_size: Callable[[int], int],
    pairs: PairReference | None,
) -> Iterator[StepInput]:
    """Global batches of the stage from wherever the state's cursor stands. Collective.

    Args:
        batch_size: samples of the global batch that begins after so many samples.
        pairs: what a stage of pairs compares with.
    """
    if pairs is None:
        yield from pretrain.step_inputs(loader, state, batch_size, plan)
        return
    assert isinstance(loader, RowLoader), "pairs lie in rows"

    def complete(batches: list[Batch], cursor: Cursor) -> None:
        rows = [
            [cursor.order.sample_id(at) for at in loader.positions(number, cursor.consumed_samples)]
            for number in range(len(batches))
        ]
        pairs.complete(batches, [[(one.source, one.index) for one in row] for row in rows])

    for inputs in pretrain.step_inputs(loader, state, batch_size, plan, complete=complete):
        pairs.complete_live(inputs.micro_batches)
        yield inputs
