"""Nothing in a checkpoint is run: a pickle planted in any of its files, hashes made to agree, is refused unread."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest
from megatron_slm.train.payload import read_common, read_object, read_tensor
from megatron_slm.train.payload_index import read_index
from tests import runs
from tests.breadth import widely
from tests.ranks import RankFailure

TP2 = "parallel.tensor_model_parallel_size=2"
WEIGHT = "decoder.final_layernorm.weight"


class Payload:
    """Unpickling it makes a file: what an attacker's would do is worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def in_metadata(path: Path, bad: Payload) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = bad
    (path / ".metadata").write_bytes(pickle.dumps(index))


def as_metadata(path: Path, bad: Payload) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(bad))


def in_common(path: Path, bad: Payload) -> None:
    common = torch.load(path / "common.pt", weights_only=True)
    torch.save({**common, "more": bad}, path / "common.pt")


def in_random_states(path: Path, bad: Payload) -> None:
    _redirect(path, lambda name: name.startswith("random"), [bad])


def in_a_tensor(path: Path, bad: Payload) -> None:
    _redirect(path, lambda name: name == WEIGHT, bad)


def _redirect(path: Path, chosen: Callable[[str], bool], value: Any) -> None:
    """Let the index point to ``value``, appended to a payload file, for every chosen name."""
    index = pickle.loads((path / ".metadata").read_bytes())
    stream = io.BytesIO()
    torch.save(value, stream)
    for key, info in index.storage_data.items():
        if chosen(key.fqn):
            file = path / info.relative_path
            info.offset, info.length = file.stat().st_size, len(stream.getvalue())
            file.write_bytes(file.read_bytes() + stream.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(index))


PLACES = {
    "metadata": in_metadata,
    "whole-metadata": as_metadata,
    "common": in_common,
    "random-states": in_random_states,
    "tensor": in_a_tensor,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    assert runs.train(path, data, 2, "train.train_iters=1", "train.eval_iters=0", TP2) == 0
    return path


def plant(run: Path, into: Path, place: str) -> tuple[Path, Path]:
    """A copy of the run with the payload in its checkpoint, and the mark the payload would make."""
    copy, mark = into / "run", into / "it-ran"
    shutil.copytree(run, copy)
    path = runs.checkpoint_path(copy, 1)
    known = manifest.read_manifest(path)
    PLACES[place](path, Payload(mark))
    manifest.seal(path, step=known.step, identity=known.identity)
    manifest.verify(path, identity=known.identity)
    return copy, mark


@pytest.mark.parametrize("place", widely(["metadata", "random-states", "tensor"], "random-states"))
def test_a_resume_refuses_it(tmp_path: Path, run: Path, data: Path, place: str) -> None:
    copy, mark = plant(run, tmp_path, place)
    with pytest.raises(RankFailure, match="nothing was run") as failure:
        runs.train(copy, data, 2, "train.train_iters=2", "train.eval_iters=0", TP2)
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["common"])
def test_a_start_from_its_weights_refuses_it(tmp_path: Path, run: Path, data: Path, place: str) -> None:
    copy, mark = plant(run, tmp_path, place)
    start = f"checkpoint.pretrained_checkpoint={copy}"
    with pytest.raises(RankFailure, match="nothing was run") as failure:
        runs.train(tmp_path / "tuned", data, 1, "train.train_iters=1", "train.eval_iters=0", start)
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)
    assert not mark.exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_reader_of_single_entries_refuses_it(tmp_path: Path, run: Path, place: str) -> None:
    copy, mark = plant(run, tmp_path, place)
    path = runs.checkpoint_path(copy, 1)
    with pytest.raises(CheckpointError, match="nothing was run"):
        index = read_index(path)
        read_tensor(path, index, WEIGHT)
        for name in index.objects:
            read_object(path, index, name)
        read_common(path)
    assert not mark.exists()


def broken_metadata(path: Path) -> None:
    (path / "metadata.json").write_text("{")


def no_metadata_record(path: Path) -> None:
    (path / "metadata.json").write_text("[]")


def empty_shards(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")


def zeroed_shards(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [broken_metadata, no_metadata_record, empty_shards, zeroed_shards])
def test_what_is_damaged_with_agreeing_hashes_is_called_so(
    tmp_path: Path, run: Path, data: Path, damage: Callable[[Path], None]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = runs.checkpoint_path(copy, 1)
    damage(path)
    manifest.seal(path, step=1, identity=manifest.read_manifest(path).identity)
    start = f"checkpoint.pretrained_checkpoint={copy}"
    with pytest.raises(RankFailure, match="damaged") as failure:
        runs.train(tmp_path / "tuned", data, 1, "train.train_iters=1", "train.eval_iters=0", start)
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)
    assert "check that the model section" not in str(failure.value)


def test_a_plain_pickle_is_refused_without_torchs_advice(
    tmp_path: Path, run: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "common.pt").write_bytes(pickle.dumps(Payload(tmp_path / "it-ran")))
    with pytest.raises(CheckpointError, match="nothing was run"):
        read_common(tmp_path)
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]
    assert not (tmp_path / "it-ran").exists()


def test_torch_itself_would_run_it(tmp_path: Path, run: Path) -> None:
    """The payload is live: torch's own reader of the index makes the mark."""
    copy, mark = plant(run, tmp_path, "metadata")
    torch.distributed.checkpoint.FileSystemReader(runs.checkpoint_path(copy, 1)).read_metadata()
    assert mark.exists()


def test_an_index_that_leaves_the_checkpoint_is_refused(tmp_path: Path, run: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = runs.checkpoint_path(copy, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../../secret.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of the payload"):
        read_index(path)


def test_what_is_read_without_torchs_index_is_what_torch_reads(run: Path) -> None:
    path = runs.checkpoint_path(run, 1)
    ours = runs.contents(path)
    theirs = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name: (value.size, value.properties.dtype) for name, value in theirs.items() if hasattr(value, "size")} == {
        name: (value.shape, value.dtype) for name, value in ours.items() if isinstance(value, torch.Tensor)
    }
