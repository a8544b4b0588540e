"""What a forked rank does for ``jobs.py``: be part of a job, compare what jobs have left, find where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_slm.config.run_config import RunConfig
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.parallel.groups import process_groups
from megatron_slm.verify import compare, diagnose
from megatron_slm.verify.job import leave, loaded, outcome, read
from megatron_slm.verify.report import Claim

PERTURBED = 2
"""One-rank jobs under rounding errors, from which the tolerances come."""


def be_reference(config: RunConfig, environment: RankEnvironment, directory: Path, *, watch: bool) -> int:
    """The one-rank job, plain and perturbed."""
    with joined(config, environment) as groups:
        for number in range(PERTURBED + 1):
            leave(outcome(config, groups, perturbation=number, watch=watch), directory / str(number))
    return 0


def be_parallel(
    config: RunConfig,
    environment: RankEnvironment,
    directory: Path,
    *,
    save_to: Path | None,
    watch: bool,
    plant: Callable[[], None] | None,
) -> int:
    """One rank of the job under test."""
    if plant is not None:
        plant()
    with joined(config, environment) as groups:
        leave(outcome(config, groups, save_to=save_to, watch=watch), directory)
        torch.distributed.barrier()  # a rank that leaves first would end another's last exchange
    return 0


def compared(
    config: RunConfig, environment: RankEnvironment, reference: Path, found: Path, saved: Path | None, *, precision: str
) -> list[Claim]:
    """The claims about a job, and about its checkpoint as one rank reads it.

    Args:
        config: of one rank, with the job's kind of optimizer.
        saved: where the checkpoint was published; None if there is none.
    """
    torch.set_num_threads(1)
    outcomes = read(found)
    rows = compare.claims(read_reference(reference), outcomes, precision)
    if saved is None:
        return rows
    with joined(config, environment) as groups:
        path = next(saved.glob("iter_*"))
        return [*rows, *compare.resume_claims(outcomes, loaded(config, groups, path), precision)]


def diagnosed(
    rows: list[Claim], reference: Path, found: Path, *, precision: str, gated: bool
) -> diagnose.Finding | None:
    """Where a job with failed claims first differs; both jobs were watched."""
    torch.set_num_threads(1)
    plain, perturbed = read_reference(reference)
    return diagnose.first_difference(rows, plain, perturbed, read(found), precision, gated=gated)


def read_reference(directory: Path) -> compare.Reference:
    """What ``be_reference`` has left."""
    plain, *perturbed = (read(directory / str(number))[0] for number in range(PERTURBED + 1))
    return compare.Reference(plain, perturbed)


@contextmanager
def joined(config: RunConfig, environment: RankEnvironment) -> Iterator[Any]:
    """The process groups of this rank's job. One thread a rank: several ranks share a core here."""
    torch.set_num_threads(1)
    with process_groups(
        config.parallel,
        device="cpu",
        rank=environment.rank,
        world_size=environment.world_size,
        master=(environment.master_addr, environment.master_port),
    ) as groups:
        yield groups
