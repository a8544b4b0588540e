"""What the pairs of DPO are compared with, of every row that a run will read: taken once, or live in every step."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_slm.data.examples.document import build_rows
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.errors import DataError
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.run_parts import Run
from megatron_slm.stages import dpo, reference
from megatron_slm.stages.reference import Frozen
from megatron_slm.train.parents import Parent
from megatron_slm.train.step import StepPlan

Rows = Mapping[str, Sequence[int]]
"""Numbers of rows by source."""

Sums = dict[str, np.ndarray]
"""By source, summed log-probabilities float64 [documents]; NaN where they have not been taken."""


class PairReference:
    """Completes micro-batches of pairs with the reference's log-probabilities and the weights of the likelihood term.

    Sums by document are taken once, before the first step, and kept in the run's directory: a run that is started again
    reads them. Samples that are passed over, or other shares, lead to rows that were not foreseen: theirs are taken
    when it happens. A live reference is a second model, which runs in every step.
    """

    def __init__(self, run: Run, build: Callable[[], Frozen], parent: Parent) -> None:
        """Take or read the sums, or build the live reference. Collective.

        Args:
            run: whose state may stand anywhere.
            build: the frozen model that the run began with.
            parent: the checkpoint of that model; sums of another are not read.
        """
        config = run.resolved.config
        self._config, self._plan, self._state = config, run.plan, run.state
        self._build, self._parent, self._kept = build, parent, run.directory.path
        self._warn = run.log.warn if run.log is not None else None
        self._live = build() if config.dpo.dpo_reference == "live" else None
        self._sources = {"train": run.data.train, "valid": run.data.valid}
        self._sums: dict[str, Sums] = {}
        self._foreseen: tuple[MixtureOrder | None, int] = (None, 0)
        live = self._live
        once = cache(build) if live is None else lambda: live
        if live is None and run.state.step < config.train.train_iters:
            self._foresee(once)
        if run.data.valid:
            limit = config.train.eval_iters * config.train.global_batch_size
            self._fill(
                "valid", {name: range(min(limit, one.num_samples)) for name, one in run.data.valid.items()}, once
            )

    def complete(self, batches: list[Batch], rows: Sequence[Sequence[tuple[str, int]]], split: str = "train") -> None:
        """Add fields to the whole micro-batches of a step, on the host. Collective.

        Args:
            rows: of each micro-batch, source and number of its rows; what it has beyond them is padding.
            split: "train", of the step that begins where the state stands, or "valid".

        Raises:
            DataError: the reference has no number for one of the rows.
        """
        if self._config.dpo.dpo_sft_weight:
            weigh_chosen(batches, self._config.dpo.dpo_sft_weight, self._plan)
        if split == "train":
            if self._live is not None:
                return
            self._foresee(self._build)
        for batch, numbers in zip(batches, rows, strict=True):
            found = [sums_of_row(self._sums[split], self._sources[split], name, index) for name, index in numbers]
            reference.spread(batch, np.concatenate([np.zeros(0), *found]))

    def complete_live(self, batches: Sequence[Batch]) -> None:
        """Add what a live reference says to local micro-batches. Collective."""
        if self._live is not None:
            reference.add_live(self._live, batches, self._plan)

    def _foresee(self, build: Callable[[], Frozen]) -> None:
        """Have the sums of all rows from here to the last step. Collective: every rank's state stands at one place."""
        train, cursor = self._config.train, self._state.cursor
        order, stop = self._foreseen
        if order == cursor.order and cursor.consumed_samples + train.global_batch_size <= stop:
            return
        stop = cursor.consumed_samples + max(1, train.train_iters - self._state.step) * train.global_batch_size
        self._foreseen = cursor.order, stop
        self._fill("train", rows_to_read(cursor.order, stop), build)

    def _fill(self, split: str, rows: Rows, build: Callable[[], Frozen]) -> None:
        """Take the sums that are not there yet, and keep them. Collective."""
        sources, file = self._sources[split], self._kept / f"reference_{split}.npz"
        if split not in self._sums:
            self._sums[split] = _stored(file, sources, self._parent, self._warn)
        sums = self._sums[split]
        missing = {name: _missing(sums[name], sources[name], numbers) for name, numbers in rows.items()}
        if not any(missing.values()):
            return
        frozen = build()
        for name, numbers in missing.items():
            if numbers:
                taken = self._precomputed(frozen, sources[name], numbers)
                sums[name] = np.where(np.isnan(taken), sums[name], taken)
        if dist.get_rank() == 0:
            store_sums(file, sources, self._parent, sums)

    def _precomputed(self, frozen: Frozen, source: ExampleRows, rows: Sequence[int]) -> np.ndarray:
        return reference.precompute(
            frozen,
            partial(_batch_of, source),
            rows,
            source.store.num_documents,
            self._plan,
            micro_batch_size=self._config.train.micro_batch_size,
        )


def sums_of_row(sums: Sums, sources: Mapping[str, Any], name: str, index: int) -> np.ndarray:
    """What the reference says of the documents of a row, float64 [documents of the row].

    Raises:
        DataError: of one of them it has said nothing, or no number.
    """
    found: np.ndarray = sums[name][sources[name].documents(index)]
    if np.isnan(found).any():
        raise DataError(
            f"the reference of DPO has no log-probability for row {index} of {name}, without which it cannot be "
            "trained on; remove reference_train.npz and reference_valid.npz from the run's directory and start the "
            "run again, or set dpo.dpo_reference=live"
        )
    return found


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


def rows_to_read(order: MixtureOrder, stop: int) -> dict[str, list[int]]:
    """Of each source the rows at the positions before ``stop``, ascending."""
    numbers, _, indices = order.sample_ids(0, stop)
    return {source.name: np.unique(indices[numbers == number]).tolist() for number, source in enumerate(order.sources)}


def _missing(sums: np.ndarray, source: ExampleRows, rows: Sequence[int]) -> list[int]:
    return [index for index in rows if np.isnan(sums[source.documents(index)]).any()]


def _batch_of(source: ExampleRows, rows: Sequence[int]) -> tuple[Batch, list[int]]:
    batch = build_rows([source.row(index) for index in rows], seq_length=source.seq_length, eod_id=source.eod_id)
    return batch, [number for index in rows for number in source.documents(index)]


def _stored(path: Path, sources: Mapping[str, ExampleRows], parent: Parent, warn: Callable[[str], None] | None) -> Sums:
    """What an earlier start has kept, as far as it is of this reference and these rows. Collective.

    Rank 0 reads it for all, and says what it does not use where it has a log.
    """
    told: list[Any] = [read_sums(path, sources, parent) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    sums, problem = told[0]
    if problem is not None and warn is not None:
        warn(f"{path} {problem}: its log-probabilities are taken anew.")
    found: Sums = sums
    return found


def read_sums(path: Path, sources: Mapping[str, ExampleRows], parent: Parent) -> tuple[Sums, str | None]:
    """The sums in a file, NaN where it has none, and why those that are there are not used, if so. One rank alone."""
    sums = {name: np.full(source.store.num_documents, np.nan) for name, source in sources.items()}
    if not path.is_file():
        return sums, None
    try:
        with np.load(path) as file:
            if "parent manifest" not in file or str(file["parent manifest"]) != parent.manifest:
                whose = str(file["parent path"]) if "parent path" in file else "an unknown checkpoint"
                return sums, f"is of {whose}, and this run began with another, {parent.path}"
            known = [name for name in sources if f"{name} digest" in file]
            other = [name for name in known if str(file[f"{name} digest"]) != sources[name].digest]
            sums |= {name: file[f"{name} sums"] for name in known if name not in other}
            return sums, f"is of other rows of {', '.join(other)}" if other else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return sums, f"cannot be read ({error})"


def store_sums(path: Path, sources: Mapping[str, ExampleRows], parent: Parent, sums: Sums) -> None:
    """Keep sums, whose they are, and of which rows. One rank alone."""
    arrays: dict[str, Any] = {"parent path": parent.path, "parent manifest": parent.manifest}
    for name, source in sources.items():
        arrays |= {f"{name} digest": source.digest, f"{name} sums": sums[name]}
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)
