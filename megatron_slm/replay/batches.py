"""``replay/batches/``: the newest steps' batches whole, as each rank was given them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.pipeline import Batch

FOLDER = "batches"


def batch_path(folder: Path, rank: int, step: int) -> Path:
    """Where a rank's batch of a step lies."""
    return folder / FOLDER / f"rank_{rank:05d}_step_{step:07d}.pt"


def keep(folder: Path, rank: int, step: int, micro_batches: Sequence[Batch], *, newest: int) -> None:
    """Write a step's micro-batches, in one rename, and remove what is older than the ``newest`` steps."""
    path = batch_path(folder, rank, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save([{name: tensor.cpu() for name, tensor in batch.items()} for batch in micro_batches], temporary)
    os.replace(temporary, path)
    for old in kept_steps(folder, rank)[:-newest]:
        batch_path(folder, rank, old).unlink(missing_ok=True)


def kept_steps(folder: Path, rank: int) -> list[int]:
    """Steps whose batches of a rank are there, in their order."""
    pattern = re.compile(rf"rank_{rank:05d}_step_(\d+)\.pt")
    found = (pattern.fullmatch(entry.name) for entry in (folder / FOLDER).glob(f"rank_{rank:05d}_step_*.pt"))
    return sorted(int(match[1]) for match in found if match)


def read(folder: Path, rank: int, step: int) -> list[Batch]:
    """A kept batch, on the host.

    Raises:
        CheckpointError: it was not kept.
    """
    path = batch_path(folder, rank, step)
    if not path.exists():
        steps = kept_steps(folder, rank)
        raise CheckpointError(
            f"{path} is missing: of rank {rank} the batches of steps {steps or 'none'} are kept (replay.keep_batches)."
        )
    batches: list[Batch] = torch.load(path, weights_only=True)
    return batches


def forget_after(folder: Path, rank: int, step: int) -> None:
    """Remove the batches of steps that will be made again."""
    for later in kept_steps(folder, rank):
        if later > step:
            batch_path(folder, rank, later).unlink(missing_ok=True)
