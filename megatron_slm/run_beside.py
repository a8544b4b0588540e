"""Where the steps of a run come from, and the other models that its stage needs for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.document import Document
from megatron_slm.data.examples.loader import RowLoader
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.loader import TrainLoader
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.isolation import require_isolation
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.replay.batches import step_inputs
from megatron_slm.run_judge import judge_of
from megatron_slm.run_parts import Run
from megatron_slm.run_policy import Policy, parent_of, starting_model, teacher_of
from megatron_slm.run_reference import PairReference
from megatron_slm.run_rollouts import sampling_of
from megatron_slm.stages import pretrain
from megatron_slm.stages.experience import Sampler
from megatron_slm.stages.on_policy import micro_batches, numbered
from megatron_slm.stages.reference import Frozen
from megatron_slm.stages.sequences import Shape
from megatron_slm.stages.stored_teacher import StoredTeacher
from megatron_slm.stages.teacher import add_hidden
from megatron_slm.train.batch_size import global_batch_size_at
from megatron_slm.train.step import StepInput

SHARED_PRODUCTS = 1e-4
"""How far documents may move others where they share a matrix product: tokens of one expert, scales of FP8."""


class Beside(NamedTuple):
    """The other models of a run, as far as its stage has any.

    Attributes:
        pairs: what DPO compares with.
        teacher: of a distillation.
        stored: what a teacher has said before, of a distillation.
        policy: answers and judges, of PPO and GRPO.
    """

    pairs: PairReference | None = None
    teacher: Frozen | None = None
    stored: StoredTeacher | None = None
    policy: Policy | None = None

    @property
    def completes(self) -> PairReference | StoredTeacher | None:
        """Adds fields to micro-batches on the host."""
        return self.pairs or self.stored


def beside_of(run: Run) -> Beside:
    """The other models that the stage needs, built and loaded. Collective."""
    config = run.resolved.config
    if config.replay.batches_of is not None and (config.stage == "dpo" or config.distill.teacher_topk is not None):
        return Beside()  # what they add to a micro-batch was kept with it
    match config.stage:
        case "dpo":
            return Beside(pairs=PairReference(run, partial(starting_model, run), parent_of(run)))
        case "distill" if config.distill.teacher_topk is None:
            return Beside(teacher=teacher_of(run))
        case "distill":
            sources = {"train": run.data.train, "valid": run.data.valid}
            return Beside(stored=StoredTeacher(config.distill, sources, config.data.train_on))
        case "ppo" | "grpo":
            return Beside(policy=Policy(run, *judge_of(run)))
    return Beside()


def require_isolated_documents(run: Run, beside: Beside) -> None:
    """Try on every pipeline stage, before the first step, that packed examples do not see each other. Collective.

    Raises:
        ConfigError: on every rank; names the stage.
    """
    config, state = run.resolved.config, run.state
    if not config.data.pack_rows or not isinstance(run.loader, RowLoader) or config.replay.batches_of is not None:
        return  # kept batches were tried when they were recorded
    size = global_batch_size_at(state.cursor.consumed_samples, train=config.train)
    batch = pretrain.local_batch(next(run.loader.micro_batches(state.cursor, size)), run.plan)
    if beside.teacher is not None:
        add_hidden(beside.teacher, [batch], run.plan)
    with gathered_parameters(state.chunks):
        require_isolation(
            state.chunks,
            batch,
            seq_length=run.plan.seq_length,
            groups=run.plan.groups,
            tolerance=SHARED_PRODUCTS if config.model.num_moe_experts or config.precision.fp8 else 0.0,
        )


def inputs_of(run: Run, beside: Beside | None = None) -> Iterator[StepInput]:
    """Global batches from wherever the state's cursor stands. Collective, where ``beside`` holds models."""
    config, beside = run.resolved.config, beside or Beside()
    if (kept := config.replay.batches_of) is not None:
        return step_inputs(Path(kept), dist.get_rank(), run.state, run.plan.device)
    if beside.policy is not None:
        return beside.policy.inputs()
    if beside.teacher is not None and config.distill.distill_on_policy_fraction > 0:
        return _inputs_on_policy(run, beside.teacher)
    return _inputs_of_data(run, beside)


def _inputs_on_policy(run: Run, teacher: Frozen) -> Iterator[StepInput]:
    """A distillation's steps on answers of which the student has drawn some itself."""
    config, state, plan, loader = run.resolved.config, run.state, run.plan, run.loader
    sampler = Sampler(
        state.chunks, sampling_of(config, run.data.tokenizer), 1, run.vocab_size, config.rollout.batch_size
    )
    shape = Shape(plan.seq_length, config.train.micro_batch_size, loader.eod_id)
    while True:
        cursor = state.cursor
        size = global_batch_size_at(cursor.consumed_samples, train=config.train)
        examples = numbered(_documents(loader, cursor, size), plan.seq_length)
        batches = micro_batches(examples, config.distill.distill_on_policy_fraction, sampler, state.step, plan, shape)
        add_hidden(teacher, batches, plan)
        yield StepInput(batches, cursor.advance(size))


def _documents(loader: RowLoader, cursor: Cursor, size: int) -> Iterator[tuple[int, int, Document]]:
    """Position, place in its row, and document, of this rank's rows of the step that begins at ``cursor``."""
    for number in range(loader.num_micro_batches(size)):
        for position in loader.positions(number, cursor.consumed_samples):
            found = cursor.order.sample_id(position)
            source = loader.sources[found.source]
            if not isinstance(source, ExampleRows):
                raise ConfigError(
                    f"distill.distill_on_policy_fraction: the source {found.source} is text without prompts; set 0"
                )
            for place, document in enumerate(source.documents(found.index)):
                yield position, place, source.document(document)


def _inputs_of_data(run: Run, beside: Beside) -> Iterator[StepInput]:
    complete = partial(_complete, beside.completes, run.loader) if beside.completes is not None else None
    batch_size = partial(global_batch_size_at, train=run.resolved.config.train)
    for inputs in pretrain.step_inputs(run.loader, run.state, batch_size, run.plan, complete=complete):
        if beside.pairs is not None:
            beside.pairs.complete_live(inputs.micro_batches)
        if beside.teacher is not None:
            add_hidden(beside.teacher, inputs.micro_batches, run.plan)
        yield inputs


def _complete(
    completes: PairReference | StoredTeacher, loader: RowLoader | TrainLoader, batches: list[Batch], cursor: Cursor
) -> None:
    """Fields of the rows in the whole micro-batches of the step that begins at ``cursor``."""
    rows = [
        [cursor.order.sample_id(at) for at in loader.positions(number, cursor.consumed_samples)]
        for number in range(len(batches))
    ]
    completes.complete(batches, [[(one.source, one.index) for one in row] for row in rows])
