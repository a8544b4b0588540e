"""What the pairs of DPO are compared with, of every row that a run will read: taken once, or live in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.document import build_rows
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.run_data import Data
from megatron_slm.stages import dpo, reference
from megatron_slm.stages.reference import Frozen
from megatron_slm.train.step import StepPlan

Rows = Mapping[str, Sequence[int]]
"""Numbers of rows by source."""


class PairReference:
    """Completes micro-batches of pairs with the reference's log-probabilities and the weights of the likelihood term.

    Sums by document are taken once, before the first step, and kept in the run's directory: a run that is started again
    reads them. A live reference is a second model, which runs in every step.
    """

    def __init__(
        self, config: RunConfig, data: Data, plan: StepPlan, cursor: Cursor, build: Callable[[], Frozen], kept: Path
    ) -> None:
        """Take or read the sums, or build the live reference. Collective.

        Args:
            cursor: of the run, wherever it stands.
            build: the frozen model that the run starts from.
            kept: directory of the run.
        """
        self._config, self._plan = config, plan
        self._live = build() if config.dpo.dpo_reference == "live" else None
        self._sources = {"train": data.train, "valid": data.valid}
        self._sums: dict[str, dict[str, np.ndarray]] = {}
        wanted: dict[str, Rows] = {"train": rows_to_read(config, cursor)} if self._live is None else {}
        if data.valid:
            limit = config.train.eval_iters * config.train.global_batch_size
            wanted["valid"] = {name: range(min(limit, one.num_samples)) for name, one in data.valid.items()}
        frozen = self._live
        for split, rows in wanted.items():
            file = kept / f"reference_{split}.npz"
            sums = _stored(file, self._sources[split], rows)
            if sums is None:
                frozen = frozen or build()
                sums = {name: self._precomputed(frozen, split, name, rows[name]) for name in rows}
                if dist.get_rank() == 0:
                    _store(file, self._sources[split], rows, sums)
            self._sums[split] = sums

    def complete(self, batches: list[Batch], rows: Sequence[Sequence[tuple[str, int]]], split: str = "train") -> None:
        """Add fields to the whole micro-batches of a step, on the host. Collective over dp.

        Args:
            rows: of each micro-batch, source and number of its rows; what it has beyond them is padding.
            split: "train" or "valid".
        """
        if self._config.dpo.dpo_sft_weight:
            weigh_chosen(batches, self._config.dpo.dpo_sft_weight, self._plan)
        if split not in self._sums:
            return  # live
        sums = self._sums[split]
        for batch, numbers in zip(batches, rows, strict=True):
            found = [sums[name][self._sources[split][name].documents(index)] for name, index in numbers]
            reference.spread(batch, np.concatenate([np.zeros(0), *found]))

    def complete_live(self, batches: Sequence[Batch]) -> None:
        """Add what a live reference says to local micro-batches. Collective."""
        if self._live is not None:
            reference.add_live(self._live, batches, self._plan)

    def _precomputed(self, frozen: Frozen, split: str, name: str, rows: Sequence[int]) -> np.ndarray:
        source = self._sources[split][name]
        return reference.precompute(
            frozen,
            partial(_batch_of, source),
            rows,
            source.store.num_documents,
            self._plan,
            micro_batch_size=self._config.train.micro_batch_size,
        )


def weigh_chosen(batches: list[Batch], weight: float, plan: StepPlan) -> None:
    """Give whole micro-batches of pairs the weights of DPO's likelihood term. Collective over dp.

    Its mean is over the labels of the chosen sides of the global batch, while the loss is divided by the pairs.
    """
    chosen = [(batch["segments"] >= 0) & (batch["segments"] % 2 == 0) for batch in batches]
    pairs = sum(int(batch["segments"][mine].unique().numel()) for batch, mine in zip(batches, chosen, strict=True))
    counts = torch.tensor([pairs, sum(int(mine.sum()) for mine in chosen)], device=plan.device)
    dist.all_reduce(counts, group=plan.groups.dp)
    of_label = dpo.sft_token_weight(weight, *counts.tolist())
    for batch, mine in zip(batches, chosen, strict=True):
        batch["sft_weights"] = torch.where(mine, of_label, 0.0).to(torch.float64)


def rows_to_read(config: RunConfig, cursor: Cursor) -> dict[str, list[int]]:
    """Of each source the rows of the whole run, ascending; phases that the run decides itself are not foreseen."""
    last = max(config.train.train_iters * config.train.global_batch_size, cursor.consumed_samples)
    numbers, _, indices = cursor.order.sample_ids(0, last)
    return {
        source.name: np.unique(indices[numbers == number]).tolist()
        for number, source in enumerate(cursor.order.sources)
    }


def _batch_of(source: ExampleRows, rows: Sequence[int]) -> tuple[Batch, list[int]]:
    batch = build_rows([source.row(index) for index in rows], seq_length=source.seq_length, eod_id=source.eod_id)
    return batch, [number for index in rows for number in source.documents(index)]


def _stored(path: Path, sources: Mapping[str, Any], rows: Rows) -> dict[str, np.ndarray] | None:
    """What an earlier start has kept, if it is of these rows: rank 0 reads it for all. Collective."""
    found: list[Any] = [_read(path, sources, rows) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    stored: dict[str, np.ndarray] | None = found[0]
    return stored


def _read(path: Path, sources: Mapping[str, Any], rows: Rows) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    with np.load(path) as file:
        for name in rows:
            if f"{name} rows" not in file or str(file[f"{name} digest"]) != sources[name].digest:
                return None
            if not np.isin(rows[name], file[f"{name} rows"]).all():
                return None
        return {name: file[f"{name} sums"] for name in rows}


def _store(path: Path, sources: Mapping[str, Any], rows: Rows, sums: Mapping[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = {}
    for name in rows:
        arrays |= {f"{name} rows": list(rows[name]), f"{name} digest": sources[name].digest, f"{name} sums": sums[name]}
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)
