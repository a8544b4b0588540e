"""What a recording has kept of its run's inputs and program, and what is said where something is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import CheckpointError, ConfigError, DataError
from megatron_slm.replay import batches, source
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.kept import batch_path, batches_missing, corpora_missing
from megatron_slm.replay.stream import StreamWriter
from megatron_slm.train.step import StepInput


def cursor() -> Cursor:
    order = MixtureOrder((Source("corpus", SampleOrder(100, 1, "digest", 4)),), (Phase(0, (("corpus", 1),)),))
    return Cursor.start(order, "tokenizer")


def keep(folder: Path, rank: int, step: int, at: Cursor) -> None:
    batches.keep(folder, rank, step, StepInput([{"tokens": torch.tensor([[step]])}], at), newest=3)


def test_a_kept_batch_has_its_place_in_the_data(tmp_path: Path) -> None:
    begun = cursor()
    after = begun.skip(4).advance(8)
    keep(tmp_path, 0, 1, after)
    kept = batches.read(tmp_path, 0, 1)
    assert kept.micro_batches[0]["tokens"].tolist() == [[1]]
    assert batches.behind(begun, kept) == after, "also what was passed over on the way"
    torch.save([{"tokens": torch.tensor([[1]])}], batch_path(tmp_path, 0, 1))
    with pytest.raises(CheckpointError, match="an older version"):
        batches.behind(begun, batches.read(tmp_path, 0, 1))
    batch_path(tmp_path, 0, 1).write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="is damaged"):
        batches.read(tmp_path, 0, 1)
    with pytest.raises(DataError, match="this run reads kept batches"):
        batches.KeptSamples("corpus", 0, {}).sample(3, 4)


def test_the_first_batch_that_is_not_there_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        StreamWriter(tmp_path / "replay", rank, step=0).close()
        for step in range(1, 6 - rank):
            keep(tmp_path / "replay", rank, step, cursor())
    recording = Capsule.of(tmp_path)
    assert batches_missing(recording, range(3, 5)) == []
    assert batches_missing(recording, range(3, 6)) == [
        "kept batches: rank 1 has those of steps 2 to 4, and step 5 is needed"
    ]


def test_a_corpus_is_known_by_its_digest(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text(json.dumps({"digest": "d"}))
    record = {"directory": str(tmp_path), "digest": "d"}
    assert corpora_missing({"text": record}, None) == []
    assert "other tokens" in corpora_missing({"text": {**record, "digest": "e"}}, None)[0]
    assert "gone or damaged" in corpora_missing({"text": {**record, "directory": str(tmp_path / "no")}}, None)[0]
    assert "no such directory" in corpora_missing({"replay": {}}, str(tmp_path / "no"))[0]


def test_the_way_back_to_a_program_is_what_is_typed(tmp_path: Path) -> None:
    recorded = {"sources_sha256": "s", "commit": "c", "diff_sha256": None}
    assert source.way_back(recorded, tmp_path) == "git checkout c"
    changed = {**recorded, "diff_sha256": "d", "diff": "code_0000000.diff"}
    assert source.way_back(changed, tmp_path) == f"git checkout c && git apply {tmp_path / 'code_0000000.diff'}"
    assert "of 9 bytes, which were not kept" in source.way_back({**changed, "diff": None, "diff_bytes": 9}, tmp_path)
    assert "the sha256 s" in source.way_back({**recorded, "commit": None}, tmp_path)
    with pytest.raises(ConfigError, match="not a checkout"):
        source.package_in(tmp_path)


def test_a_difference_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "code_difference", lambda: b"x" * 10)
    assert source.keep_difference(tmp_path, 3)["diff"] == "code_0000003.diff"
    assert (tmp_path / "code_0000003.diff").read_bytes() == b"x" * 10
    monkeypatch.setattr(source, "LARGEST_DIFFERENCE_BYTES", 9)
    assert source.keep_difference(tmp_path, 4)["diff"] is None and not (tmp_path / "code_0000004.diff").exists()
