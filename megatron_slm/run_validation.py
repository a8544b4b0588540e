"""Held-out loss of a run: of every source, of all together and of averaged weights, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.loader import ValidRowLoader
from megatron_slm.data.loader import ValidLoader
from megatron_slm.data.shares import after_validation
from megatron_slm.evaluate.perplexity import HeldOut, held_out
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.run_beside import Beside
from megatron_slm.run_data import Data
from megatron_slm.run_policy import Policy
from megatron_slm.run_reference import PairReference
from megatron_slm.stages import pretrain
from megatron_slm.stages.stored_teacher import StoredTeacher
from megatron_slm.stages.teacher import add_hidden
from megatron_slm.train.ema import Ema
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.step import StepPlan, TrainState


def evaluation(
    config: RunConfig, data: Data, plan: StepPlan, log: MetricsWriter | None, beside: Beside
) -> Callable[[TrainState], float]:
    """A function that evaluates the held-out samples, the same ones each time, reports and returns the loss.

    It is collective, and every rank gets the same number. With ``data.loss_aware_strength`` it also moves the shares of
    the sources from here on.
    """
    if beside.policy is not None:
        return evaluation_of_answers(beside.policy, log)
    measure = measurement(config, data, plan, beside)
    strength = config.data.loss_aware_strength

    def evaluate(state: TrainState) -> float:
        by_source, before = measure(state), state.cursor
        loss = overall(by_source)
        averaged: HeldOut | None = None
        average = state.parts.get("ema")
        if isinstance(average, Ema):
            with average.applied(state):
                averaged = overall(measure(state))
        losses = {name: found.loss for name, found in by_source.items()}
        if strength:
            state.cursor = after_validation(state.cursor, losses, strength)
        shares = state.cursor.order.phase_at(state.cursor.consumed_samples).shares
        if log is not None:
            log.validation(
                loss.loss,
                tokens=loss.tokens,
                step=state.step,
                consumed_samples=state.cursor.consumed_samples,
                by_source=losses if len(losses) > 1 else {},
                averaged=averaged.loss if averaged else None,
                others=loss.others,
                shares={name: float(share) for name, share in shares.items()} if strength else None,
            )
            if strength:
                log.say(shares_line(before, state.cursor))
        return loss.loss

    return evaluate


def evaluation_of_answers(policy: Policy, log: MetricsWriter | None) -> Callable[[TrainState], float]:
    """A function that answers the held-out prompts greedily, reports how good that is, and returns what is to fall."""

    def evaluate(state: TrainState) -> float:
        found = policy.evaluate(state)
        if log is not None:
            log.validation(
                -found["reward"],
                tokens=round(found["answers"]),
                step=state.step,
                consumed_samples=state.cursor.consumed_samples,
                others=found,
            )
        return -found["reward"]

    return evaluate


def shares_line(before: Cursor, after: Cursor) -> str:
    """What a validation has decided about the samples to come."""
    position = after.consumed_samples
    old, new = (cursor.order.phase_at(position) for cursor in (before, after))
    was = "as before" if old.parts == new.parts else f"before: {old.shares_text}"
    return f"shares from sample {position} on: {new.shares_text} (by held-out loss; {was})"


def measurement(
    config: RunConfig, data: Data, plan: StepPlan, beside: Beside
) -> Callable[[TrainState], dict[str, HeldOut]]:
    """A function that takes the held-out loss of each source: ``train.eval_iters`` global batches of every one."""
    loaders = {name: valid_loader(config, samples, plan) for name, samples in data.valid.items()}
    multiple = config.parallel.pipeline_model_parallel_size if config.parallel.vpp_size > 1 else 1

    # Pretraining also logs what a model in evaluation mode does not compute.
    logged = plan.logged[:1] if config.stage == "pretrain" else plan.logged

    def with_teacher(batches: list[Batch]) -> list[Batch]:
        if beside.teacher is not None:
            add_hidden(beside.teacher, batches, plan)
        return batches

    def measure_one(state: TrainState, name: str, loader: ValidLoader | ValidRowLoader) -> HeldOut:
        steps = loader.steps(config.train.eval_iters, config.train.global_batch_size, multiple=multiple)
        if beside.completes is not None and isinstance(loader, ValidRowLoader):
            steps = _completed(steps, name, loader, config, beside.completes)
        on_device = (with_teacher([pretrain.local_batch(batch, plan) for batch in step]) for step in steps)
        return held_out(
            state.chunks,
            on_device,
            plan.loss,
            seq_length=plan.seq_length,
            groups=plan.groups,
            device=plan.device,
            logged=logged,
        )

    return lambda state: {name: measure_one(state, name, loader) for name, loader in loaders.items()}


def _completed(
    steps: Iterator[list[Batch]],
    name: str,
    loader: ValidRowLoader,
    config: RunConfig,
    completes: PairReference | StoredTeacher,
) -> Iterator[list[Batch]]:
    """Held-out micro-batches of the source ``name``, with what the loss compares them with."""
    size = config.train.global_batch_size
    samples = loader.num_samples(config.train.eval_iters, size)
    for step, batches in enumerate(steps):
        positions = [loader.positions(number, step * size) for number in range(len(batches))]
        completes.complete(batches, [[(name, at) for at in each if at < samples] for each in positions], "valid")
        yield batches


def valid_loader(config: RunConfig, samples: Any, plan: StepPlan) -> ValidLoader | ValidRowLoader:
    """Held-out samples of one source for this data-parallel rank."""
    place = {
        "seq_length": config.model.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "data_parallel_rank": plan.groups.dp.rank(),
        "data_parallel_size": plan.groups.dp.size(),
    }
    if config.stage == "pretrain":
        return ValidLoader(samples, config=config.data, **place)
    return ValidRowLoader(samples, **place)


def overall(by_source: dict[str, HeldOut]) -> HeldOut:
    """All sources together, each token counting once."""
    if len(by_source) == 1:
        return next(iter(by_source.values()))
    tokens = sum(found.tokens for found in by_source.values())
    return HeldOut(sum(found.loss * found.tokens for found in by_source.values()) / tokens, tokens)
