"""Pretraining: next-token prediction over packed documents.

A stage gives the loop an iterator of step inputs and a loss. Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.data.cursor import Cursor
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.ending import TokenSums
from megatron_slm.parallel import context
from megatron_slm.parallel.pipeline import Batch, LossFunction
from megatron_slm.parallel.vocab_loss import CROSS_ENTROPY, OBJECTIVE, SQUARED_LOG_PARTITION, Objective
from megatron_slm.train.config import TrainConfig
from megatron_slm.train.step import StepInput, StepPlan, TrainState

ON_HOST = ("document_ids",)  # parallel/attention.py reads the documents' boundaries before it launches kernels


class Loader(Protocol):
    """What reads the samples of this data-parallel rank."""

    def micro_batches(self, cursor: Cursor, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches [B, S] of the step that begins at ``cursor``."""


def step_inputs(
    loader: Loader,
    state: TrainState,
    batch_size: Callable[[int], int],
    plan: StepPlan,
    *,
    complete: Callable[[list[Batch], Cursor], None] | None = None,
) -> Iterator[StepInput]:
    """Endless global batches, each from where the state's cursor then stands: a roll-back moves it.

    Args:
        batch_size: samples of the global batch that begins after so many samples.
        complete: adds fields to the micro-batches of the step that begins at a cursor, still whole and on the host.

    Returns:
        This rank's micro-batches and the cursor after them.
    """
    while True:
        cursor = state.cursor
        size = batch_size(cursor.consumed_samples)
        batches = loader.micro_batches(cursor, size)
        if complete is not None:
            whole = list(batches)
            complete(whole, cursor)
            batches = iter(whole)
        yield StepInput([local_batch(batch, plan) for batch in batches], cursor.advance(size))


def ending(train: TrainConfig, vocab_size: int) -> TokenSums:
    """The model sums the objective itself; see ``parallel.vocab_loss``."""
    return TokenSums(Objective(vocab_size, train.z_loss_coefficient, train.label_smoothing))


def loss(
    output: Tensor, batch: Batch, *, logged: Sequence[str] = ("lm loss",), z_loss_coefficient: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the objective, number of its tokens, what to log as pairs of sum and tokens).

    The model has summed already (``parallel/vocab_loss.py``); core divides by the tokens of the whole global batch, so
    the result does not depend on how the batch was cut.

    Args:
        output: [3], see ``vocab_parallel_loss``; with multi-token prediction more, see ``with_predictions``.
        logged: "lm loss", the cross-entropy whatever the objective is; "objective"; "z loss", its part; "mtp_1 loss",
            "mtp_2 loss" ..., the cross-entropy of the predictions of that depth over their own tokens. What ``output``
            does not hold, as that of an evaluation, is left out.
        z_loss_coefficient: of the model's objective.
    """
    tokens = batch["loss_mask"].sum()
    sums = output.detach().double()
    found = {
        "lm loss": sums[CROSS_ENTROPY],
        "objective": sums[OBJECTIVE],
        "z loss": z_loss_coefficient * sums[SQUARED_LOG_PARTITION],
    }
    pairs = {name: torch.stack([total, tokens.double()]) for name, total in found.items()}
    pairs |= {mtp_loss(depth): pair for depth, pair in enumerate(sums[len(found) :].view(-1, 2), start=1)}
    # A copy, because core may free what it is given, and refuses to free a view.
    logs = {name: pairs[name] for name in logged if name in pairs}
    return output[OBJECTIVE].clone(), tokens.to(torch.int), logs


def mtp_loss(depth: int) -> str:
    """Megatron's name of the loss of the predictions of a depth, counted from 1."""
    return f"mtp_{depth} loss"


def logged(train: TrainConfig, model: ModelConfig) -> tuple[str, ...]:
    """What ``loss`` has to log: the objective's own numbers only where it is not the cross-entropy."""
    names = ["lm loss"]
    depths = model.mtp_num_layers or 0
    if train.z_loss_coefficient or train.label_smoothing or depths:
        names.append("objective")
    if train.z_loss_coefficient:
        names.append("z loss")
    return (*names, *map(mtp_loss, range(1, depths + 1)))


def loss_function(train: TrainConfig, model: ModelConfig) -> LossFunction:
    """``loss`` for ``model``, built with the objective of ``train``."""
    return partial(loss, logged=logged(train, model), z_loss_coefficient=train.z_loss_coefficient)


def local_batch(batch: Batch, plan: StepPlan) -> Batch:
    """This cp rank's part of a batch of whole samples, [B, S/cp], on its device but for what the host reads."""
    part = context.cut_batch(batch, plan.groups.cp.rank(), plan.groups.cp.size())
    return {
        name: tensor if name in ON_HOST else tensor.to(plan.device, non_blocking=True) for name, tensor in part.items()
    }
