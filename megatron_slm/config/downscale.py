"""A job of any size as a few small ones of the same structure: what ``--downscale`` and ``verify`` run. No torch.

Every *option* stays: layer pattern, sharding, recomputation, precision, schedule, tied or not. Every *size* shrinks,
and ratios between sizes hold where they divide. Axes of at least two ranks become axes of two; where one small run
cannot hold all of them, several do, so that every axis, and every pair of axes that fits, is in one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from megatron_slm.config import downscale_axes, downscale_model, downscale_training
from megatron_slm.config.downscale_axes import Degrees, degrees_of
from megatron_slm.config.keys import all_keys
from megatron_slm.config.load import value_of
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.config import ParallelConfig

MOST_RANKS = 8
_BUCKET_ELEMENTS = 1 << 14

_DEGREE = "two ranks where a run holds the axis"
_PARALLEL_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "device": "ranks of this machine's CPU",
        "distributed_backend": "gloo, for ranks on the CPU",
        "world_size": "a few ranks of this machine",
        "tensor_model_parallel_size": _DEGREE,
        "pipeline_model_parallel_size": _DEGREE,
        "virtual_pipeline_model_parallel_size": "two chunks where a run holds pp",
        "context_parallel_size": _DEGREE,
        "cp_comm_type": "nothing to exchange where cp is 1",
        "expert_model_parallel_size": _DEGREE,
        "expert_tensor_parallel_size": "as the original where a run holds ep",
        "moe_grouped_gemm": "it needs Transformer Engine on a GPU; the experts' products are the same",
        "sequence_parallel": "nothing to divide where tp is 1",
        "account_for_embedding_in_pipeline_split": "no split where pp is 1",
        "account_for_loss_in_pipeline_split": "no split where pp is 1",
        "ddp_bucket_size": "several buckets to overlap, as the original has",
    }
)
_OTHER_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "name": "every run is named after the axes it holds",
        "log.runs_dir": "the runs of one downscaling lie together",
        "data.data_path": "made-up tokens",
        "data.sources": "made-up tokens",
        "tokenizer.tokenizer_model": "made-up tokens",
    }
)


@dataclass(frozen=True)
class Change:
    """One key that a downscaled job does not share with the original."""

    key: str
    before: Any
    after: Any
    """The new value; a tuple with one for each run where ``by_run``."""
    reason: str
    by_run: bool = False


@dataclass(frozen=True)
class Downscaled:
    """Small runs that together have the structure of a large job."""

    runs: tuple[RunConfig, ...]
    """Every one has ``parallel.world_size`` set. They share one model and train on the same batches."""
    changes: tuple[Change, ...]
    """Every key in which a run differs from the original, in the order of the sections."""
    missed: tuple[tuple[str, str], ...] = ()
    """Pairs of axes that no run holds together, because they need more ranks."""

    def table(self) -> str:
        """The changes as lines of text, without the names of runs and directories."""
        rows = [
            (change.key, show(change.before), _shown_after(change), change.reason)
            for change in self.changes
            if change.key not in ("name", "log.runs_dir")
        ]
        rows.insert(0, ("key", "before", "after", "why"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def downscale(
    config: RunConfig, *, ranks: int = 4, world_size: int | None = None, tokenizer_size: int | None = None
) -> Downscaled:
    """Small runs of at most ``ranks`` ranks each with the structure of ``config``.

    Args:
        config: a resolved configuration that breaks no rule, for any number of ranks.
        ranks: the most ranks that one run may have, 2 to 8.
        world_size: ranks of the large job; default ``parallel.world_size``, then the fewest that its degrees need.
        tokenizer_size: entries of the real tokenizer, which the vocabulary must hold; None for made-up tokens.

    Raises:
        ConfigError: ``ranks`` is out of range.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise ConfigError(
            f"--ranks {ranks}: a downscaled run has 2 to {MOST_RANKS}; 4 hold two axes at a time, {MOST_RANKS} three."
        )
    original = degrees_of(config, world_size)
    held = downscale_axes.runs(original, ranks)
    small = dataclasses.replace(config, model=downscale_model.shrunken(config, original, tokenizer_size))
    small = downscale_training.shrunken(small, original, held)
    small = dataclasses.replace(small, data=downscale_training.data_plans(config, small))
    directory = str(PurePath(config.log.runs_dir) / f"{config.name or config.stage}-downscaled")
    small = dataclasses.replace(small, log=dataclasses.replace(small.log, runs_dir=directory))
    runs = [dataclasses.replace(small, name=str(job), parallel=_parallel(config.parallel, job)) for job in held]
    return with_changes(config, runs, downscale_axes.missed_pairs(original, held))


def with_changes(config: RunConfig, runs: Sequence[RunConfig], missed: Sequence[tuple[str, str]] = ()) -> Downscaled:
    """``runs`` with every key in which one of them differs from ``config``."""
    found = []
    for key in all_keys():
        before, after = value_of(config, key), tuple(value_of(run, key) for run in runs)
        if any(value != before for value in after):
            same = all(value == after[0] for value in after)
            found.append(Change(key, before, after[0] if same else after, reason(key), by_run=not same))
    return Downscaled(tuple(runs), tuple(found), tuple(missed))


def reason(key: str) -> str:
    """Why a key of a downscaled run differs.

    Raises:
        KeyError: downscaling never changes that key.
    """
    section, _, field = key.rpartition(".")
    known = {"model": downscale_model.REASONS, "parallel": _PARALLEL_REASONS}.get(section, {})
    return known[field] if known else {**downscale_training.REASONS, **_OTHER_REASONS}[key]


def axes_of(config: RunConfig) -> tuple[str, ...]:
    """The axes of at least two ranks."""
    return degrees_of(config).axes


def _parallel(parallel: ParallelConfig, job: Degrees) -> ParallelConfig:
    """The section for one small run: its degrees, and only options that have an effect there."""
    return dataclasses.replace(
        parallel,
        device="cpu",
        distributed_backend=None if parallel.distributed_backend == "nccl" else parallel.distributed_backend,
        world_size=job.world_size,
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        virtual_pipeline_model_parallel_size=job.vpp if job.vpp > 1 else None,
        context_parallel_size=job.cp,
        cp_comm_type=parallel.cp_comm_type if job.cp > 1 else ParallelConfig().cp_comm_type,
        expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp,
        moe_grouped_gemm=False,
        sequence_parallel=parallel.sequence_parallel and job.tp > 1,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split and job.pp > 1,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split and job.pp > 1,
        ddp_bucket_size=_BUCKET_ELEMENTS if parallel.overlap_grad_reduce else None,
    )


def _shown_after(change: Change) -> str:
    """The new value, or one for each run."""
    return " | ".join(map(show, change.after)) if change.by_run else show(change.after)
