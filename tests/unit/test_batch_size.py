"""Batch ramp-up against Megatron's own calculator."""

from __future__ import annotations

import itertools

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.errors import ConfigError
from megatron_slm.train.batch_size import global_batch_size_at, rampup
from megatron_slm.train.config import TrainConfig


def growing(size: int, start: int, increment: int, samples: int) -> TrainConfig:
    return TrainConfig(global_batch_size=size, rampup_batch_size=(str(start), str(increment), str(samples)))


@pytest.mark.parametrize(
    ("size", "start", "increment", "samples"),
    [(32, 8, 8, 96), (1024, 16, 16, 30_001), (64, 16, 48, 1), (8, 1, 1, 9), (56, 28, 4, 100)],
)
def test_every_batch_of_a_ramp_is_megatrons(size: int, start: int, increment: int, samples: int) -> None:
    theirs = RampupBatchsizeNumMicroBatchesCalculator(size, 1, 1, False, 1, start, increment, samples)
    train = growing(size, start, increment, samples)
    for consumed in (*range(samples + 3), 10 * samples):
        theirs.update(consumed, consistency_check=True)
        assert global_batch_size_at(consumed, train) == theirs.current_global_batch_size


def test_a_run_grows_evenly_and_ends_at_the_configured_batch() -> None:
    train, consumed, sizes = growing(32, 8, 8, 96), 0, []
    while consumed < 300:
        sizes.append(global_batch_size_at(consumed, train))
        consumed += sizes[-1]
    assert [(size, len(list(same))) for size, same in itertools.groupby(sizes)] == [(8, 4), (16, 2), (24, 2), (32, 6)]


def test_without_a_ramp_the_batch_is_constant() -> None:
    assert rampup(TrainConfig()) is None
    assert {global_batch_size_at(consumed, TrainConfig(global_batch_size=6)) for consumed in range(99)} == {6}


@pytest.mark.parametrize(
    "values", [("8",), ("8", "8"), ("8", "8", "x"), ("8", "0", "9"), ("8", "8", "1.5"), ("1",) * 4]
)
def test_anything_but_three_positive_integers_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="three positive integers"):
        rampup(TrainConfig(rampup_batch_size=values))


def broken(*overrides: str) -> list[str]:
    resolved = load(None, list(overrides))
    return violations(resolved.config, provenance=resolved.provenance)


INTERLEAVED = (
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "model.num_layers=4",
)
ACCEPTED = [
    ("train.rampup_batch_size=2,2,100",),
    ("--rampup-batch-size", "4", "4", "1"),
    ("train.rampup_batch_size=4,4,10", "parallel.world_size=4"),
    ("train.rampup_batch_size=4,2,10", *INTERLEAVED),
    ("train.early_stopping_patience=2", "train.eval_interval=5"),
    ("train.z_loss_coefficient=1e-4", "train.label_smoothing=0.1", "train.ema_decay=0.999"),
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: tuple[str, ...]) -> None:
    assert broken(*overrides) == []


REFUSED = [
    (("train.rampup_batch_size=2,2",), ("train.rampup_batch_size = ", "(command line)", "START,INCREMENT,SAMPLES")),
    (("train.rampup_batch_size=8,2,9",), ("train.global_batch_size = 8", "START must be smaller")),
    (("train.rampup_batch_size=2,4,9",), ("from 2 to 8 are 6 samples", "Nearest valid INCREMENT: 3 or 6")),
    (
        ("train.rampup_batch_size=2,6,9", "parallel.world_size=6", "train.global_batch_size=18"),
        ("from 2 to 18", "INCREMENT: 4 or 8"),
    ),
    (
        ("train.rampup_batch_size=6,2,9", "parallel.world_size=4"),
        ("on 4 ranks", "1 x 4 = 4 samples", "START", "4 or 8", "INCREMENT", "Nearest valid INCREMENT: 4"),
    ),
    (
        ("train.rampup_batch_size=4,1,10", *INTERLEAVED),
        ("micro_batch_size x data-parallel size x pp = 1 x 1 x 2 = 2", "so INCREMENT", "Nearest valid INCREMENT: 2"),
    ),
    (("train.early_stopping_patience=2",), ("train.eval_interval = null", "Set train.eval_interval")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_refused(overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    text = "\n".join(broken(*overrides))
    for word in words:
        assert word in text
