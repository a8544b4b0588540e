"""Kept log-probabilities of a reference: of which checkpoint they are, and what is not among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import DataError
from megatron_slm.run_reference import read_sums, rows_to_read, store_sums, sums_of_row
from megatron_slm.train.parents import Parent

ONE, OTHER = Parent("/runs/one", "1" * 64), Parent("/runs/other", "2" * 64)


class Store(NamedTuple):
    num_documents: int = 6


class Pairs(NamedTuple):
    """Three rows of one pair each."""

    digest: str = "d"
    store: Store = Store()

    def documents(self, index: int) -> list[int]:
        return [2 * index, 2 * index + 1]


def kept(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A file with the sums of the first two rows."""
    sources: dict[str, Any] = {"pairs": Pairs()}
    sums = {"pairs": np.array([-1.0, -2.0, 0.0, -4.0, np.nan, np.nan])}
    store_sums(tmp_path / "reference_train.npz", sources, ONE, sums)
    return tmp_path / "reference_train.npz", sources


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    file, sources = kept(tmp_path)
    sums, problem = read_sums(file, sources, ONE)
    assert problem is None
    assert sums_of_row(sums, sources, "pairs", 1).tolist() == [0.0, -4.0], "0 is a sum as any other"


def test_a_missing_number_is_never_trained_on(tmp_path: Path) -> None:
    file, sources = kept(tmp_path)
    sums, _ = read_sums(file, sources, ONE)
    with pytest.raises(DataError, match="no log-probability for row 2 of pairs"):
        sums_of_row(sums, sources, "pairs", 2)


def test_numbers_of_another_parent_or_other_rows_are_not_used(tmp_path: Path) -> None:
    file, sources = kept(tmp_path)
    for changed, parent, told in (
        (sources, OTHER, "is of /runs/one, and this run began with another, /runs/other"),
        ({"pairs": Pairs(digest="e")}, ONE, "is of other rows of pairs"),
    ):
        sums, problem = read_sums(file, changed, parent)
        assert problem == told and np.isnan(sums["pairs"]).all()
    file.write_bytes(b"PK")
    sums, problem = read_sums(file, sources, ONE)
    assert "cannot be read" in str(problem) and np.isnan(sums["pairs"]).all()


def test_rows_are_those_of_all_positions_before_the_end() -> None:
    order = MixtureOrder.of_one("pairs", SampleOrder(8, 0, "d", 16))
    assert len(rows_to_read(order, 3)["pairs"]) == 3
    assert rows_to_read(order, 11)["pairs"] == list(range(8)), "a second epoch reads no other rows"
