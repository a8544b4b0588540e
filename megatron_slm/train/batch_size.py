"""Batch ramp-up: the size of a global batch as a pure function of the samples before it. No torch."""

from __future__ import annotations

from typing import NamedTuple

from megatron_slm.errors import ConfigError
from megatron_slm.train.config import TrainConfig


class Rampup(NamedTuple):
    """Grows the batch from ``start`` by ``increment`` at a time, evenly over the run's first ``samples`` samples."""

    start: int
    increment: int
    samples: int


def rampup(train: TrainConfig) -> Rampup | None:
    """The ramp-up of a configuration; None without one.

    Raises:
        ConfigError: it is not three positive integers.
    """
    if not train.rampup_batch_size:
        return None
    try:
        found = Rampup(*map(int, train.rampup_batch_size))
    except (ValueError, TypeError):
        found = None
    if found is None or min(found) < 1:
        raise ConfigError(
            "a ramp-up is three positive integers START,INCREMENT,SAMPLES. For example "
            "train.rampup_batch_size=16,16,10000 grows from 16 by 16 at a time over 10000 samples"
        )
    return found


def global_batch_size_at(consumed_samples: int, train: TrainConfig) -> int:
    """Samples of the global batch that begins after ``consumed_samples`` samples of the run.

    The rule is Megatron's (``num_microbatches_calculator``), the rounding of its one division included: a run that
    moves between the two has the same batches.
    """
    ramp = rampup(train)
    if ramp is None or consumed_samples > ramp.samples:
        return train.global_batch_size
    samples_per_increment = ramp.samples / ((train.global_batch_size - ramp.start) // ramp.increment)
    return ramp.start + int(consumed_samples / samples_per_increment) * ramp.increment
