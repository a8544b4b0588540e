"""Rules about what changes while a run runs: the batch that grows, and when the run ends early."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import nearest_multiples
from megatron_slm.train.batch_size import Rampup, rampup

RAMP, BATCH = "train.rampup_batch_size", "train.global_batch_size"


def batch_rampup(facts: Facts) -> Iterator[str]:
    """Every batch of a ramp-up can be divided as the last one is, and the steps between them end at it."""
    try:
        ramp = rampup(facts.config.train)
    except ConfigError as error:
        yield f"{facts.cite(RAMP)}: {error}."
        return
    if ramp is None:
        return
    size = facts.config.train.global_batch_size
    if ramp.start >= size:
        yield (
            f"{facts.cite(RAMP, BATCH)}: a ramp-up grows, so START must be smaller than the batch it ends at. Lower "
            f"START, or leave {RAMP} out."
        )
    elif (size - ramp.start) % ramp.increment:
        yield (
            f"{facts.cite(RAMP, BATCH)}: from {ramp.start} to {size} are {size - ramp.start} samples, which must be a "
            f"multiple of the increment. {nearest_divisors('INCREMENT', size - ramp.start, ramp.increment)}"
        )
    yield from _divisible(facts, ramp)


def _divisible(facts: Facts, ramp: Rampup) -> Iterator[str]:
    """START and INCREMENT are whole numbers of micro-batches on every replica, in groups of pp when interleaved."""
    train, parallel = facts.config.train, facts.config.parallel
    dp, left = divmod(facts.world_size, parallel.model_parallel_size)
    if left or not dp:
        return  # the rule on the world speaks already, and dp is unknown
    unit, product = (
        train.micro_batch_size * dp,
        f"micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp}",
    )
    if parallel.vpp_size > 1:
        unit *= parallel.pipeline_model_parallel_size
        product = product.replace(" =", " x pp =") + f" x {parallel.pipeline_model_parallel_size}"
    for name, samples in (("START", ramp.start), ("INCREMENT", ramp.increment)):
        if samples % unit:
            yield (
                f"{facts.cite(RAMP)} on {facts.world_size} ranks: every batch of the ramp-up must be a multiple of "
                f"{product} = {unit} samples, so {name} must be one. {nearest_multiples(name, samples, unit)}"
            )


def early_stopping(facts: Facts) -> Iterator[str]:
    """Early stopping looks at validations during the run."""
    patience, interval = "train.early_stopping_patience", "train.eval_interval"
    if facts.config.train.early_stopping_patience is None:
        return
    if facts.config.train.eval_interval is None:
        yield (
            f"{facts.cite(patience, interval)}: early stopping compares validations during the run. Set {interval} to "
            f"a number of steps, or leave {patience} out."
        )


RULES = (batch_rampup, early_stopping)
