"""``replay/batches/``: the newest steps' batches whole, as each rank was given them, and a run made again from them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_slm.data.cursor import Cursor
from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.replay.kept import batch_path, kept_steps
from megatron_slm.stages.pretrain import ON_HOST
from megatron_slm.train.step import StepInput, TrainState

PLACE = ("consumed_samples", "skipped", "rolling_digest")
"""Fields of a cursor that a step moves. The order they are a place in is the manifest's."""


class KeptBatch(NamedTuple):
    """What a rank was given for one step, on the host, and where the data stood behind it."""

    micro_batches: list[Batch]
    place: dict[str, Any]
    """``PLACE``; empty in recordings of an older version."""


def keep(folder: Path, rank: int, step: int, inputs: StepInput, *, newest: int) -> None:
    """Write a step's micro-batches, in one rename, and remove what is older than the ``newest`` steps."""
    path = batch_path(folder, rank, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    kept = {
        "micro_batches": [{name: tensor.cpu() for name, tensor in batch.items()} for batch in inputs.micro_batches],
        "place": {name: getattr(inputs.cursor, name) for name in PLACE},
    }
    torch.save(kept, temporary, _use_new_zipfile_serialization=False)  # in a fifth of the time, each step
    os.replace(temporary, path)
    for old in kept_steps(folder, rank)[:-newest]:
        batch_path(folder, rank, old).unlink(missing_ok=True)


def read(folder: Path, rank: int, step: int) -> KeptBatch:
    """A kept batch, on the host.

    Raises:
        CheckpointError: it was not kept, or is damaged.
    """
    path = batch_path(folder, rank, step)
    if not path.exists():
        steps = kept_steps(folder, rank)
        raise CheckpointError(
            f"{path} is missing: of rank {rank} the batches of steps {steps or 'none'} are kept (replay.keep_batches)."
        )
    try:
        kept = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises what its pickle, its archive or the system raise
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); restore the run's directory.") from error
    return KeptBatch(kept, {}) if isinstance(kept, list) else KeptBatch(kept["micro_batches"], kept["place"])


def forget_after(folder: Path, rank: int, step: int) -> None:
    """Remove the batches of steps that will be made again."""
    for later in kept_steps(folder, rank):
        if later > step:
            batch_path(folder, rank, later).unlink(missing_ok=True)


def step_inputs(folder: Path, rank: int, state: TrainState, device: torch.device) -> Iterator[StepInput]:
    """The kept batches from the state's step on, and what its cursor was behind each: no corpus is read.

    Raises:
        CheckpointError: that of a step was not kept.
    """
    while True:
        kept = read(folder, rank, state.step + 1)
        batches = [
            {name: tensor if name in ON_HOST else tensor.to(device) for name, tensor in batch.items()}
            for batch in kept.micro_batches
        ]
        yield StepInput(batches, behind(state.cursor, kept))


def behind(cursor: Cursor, kept: KeptBatch) -> Cursor:
    """The cursor behind a kept step.

    Raises:
        CheckpointError: an older version has kept the batch alone.
    """
    if not kept.place:
        raise CheckpointError(
            "The batches were kept by an older version, without their place in the data: point data.data_path at the "
            "corpus, or record the run again."
        )
    skipped = tuple((start, stop) for start, stop in kept.place["skipped"])
    return dataclasses.replace(cursor, **{**kept.place, "skipped": skipped})


class KeptSamples:
    """A source of which nothing is there but what the recording says of it: its samples are in the kept batches."""

    def __init__(self, name: str, eod_id: int, record: dict[str, Any]) -> None:
        """``record`` is the manifest's of this source."""
        self.name, self.eod_id, self.record = name, eod_id, record

    def sample(self, index: int, seq_length: int) -> np.ndarray:
        """Never any tokens.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"Sample {index} of {self.name} cannot be read: this run reads kept batches (replay.batches_of)."
        )
