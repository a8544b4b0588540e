"""The checkpoint that a run began with stays the one it is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.errors import CheckpointError
from megatron_slm.train.parents import PRETRAINED, RECORD, Parent, note, noted, still_there
from tests.checkpoints import whole, write_run


def made(run: Path, step: int = 3) -> Path:
    """A checkpoint whose tensor says its step."""
    tensor = torch.full((2,), float(step))
    return write_run(run, [("w", tensor, whole(tensor))], step=step)


def test_it_is_the_same_after_its_run_has_gone_on(tmp_path: Path) -> None:
    records: dict[str, Any] = {"guard": {}}
    first = made(tmp_path / "run")
    parent = note(records, PRETRAINED, first)
    note(records, "distill.distill_teacher", first)
    made(tmp_path / "run", 4)
    named = str(tmp_path / "run")
    assert records.keys() == {"guard", RECORD} and len(records[RECORD]) == 2
    assert noted(records, PRETRAINED, named) == parent == Parent(**records[RECORD][PRETRAINED])
    assert still_there(parent, PRETRAINED, named) == first


def test_it_may_have_been_moved_to_where_the_option_says(tmp_path: Path) -> None:
    first = made(tmp_path / "run")
    parent = note({}, PRETRAINED, first)
    (tmp_path / "run").rename(tmp_path / "moved")
    for named in ("moved", "moved/checkpoints", f"moved/checkpoints/{first.name}"):
        found = still_there(parent, PRETRAINED, str(tmp_path / named))
        assert found == tmp_path / "moved" / "checkpoints" / first.name


def test_what_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    first = made(tmp_path / "run")
    parent = note({}, PRETRAINED, first)
    made(tmp_path / "other", 4)
    with pytest.raises(CheckpointError, match="other does not hold the checkpoint that this run began with"):
        still_there(parent, PRETRAINED, str(tmp_path / "other"))
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match=f"any more .*{first.name}, manifest {parent.manifest[:12]}"):
        still_there(parent, PRETRAINED, str(tmp_path / "run"))
    tensor = torch.ones(2)
    write_run(tmp_path / "run", [("w", tensor, whole(tensor))])
    with pytest.raises(CheckpointError, match="start anew with --fresh"):
        still_there(parent, PRETRAINED, str(tmp_path / "run"))
