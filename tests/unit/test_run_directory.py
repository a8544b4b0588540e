"""A run's directory knows whose it is: the same run resumes, another is refused by name, --fresh moves it aside."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import CheckpointError
from megatron_slm.train.run_directory import RunDirectory, digest, prepare, surroundings

IDENTITY: dict[str, Any] = {
    "model": {"hidden_size": 128, "num_layers": 2},
    "data": {"dataset_digest": "abc", "reset_attention_mask": False},
    "seed": 1234,
}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes: what a full disk does, by the same way. Nor may the log of the tests."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def resolved(tmp_path: Path, *overrides: str) -> Resolved:
    return load(None, ["name=first", f"log.runs_dir={tmp_path}", *overrides])


def start(tmp_path: Path, identity: dict[str, Any] = IDENTITY, *, fresh: bool = False) -> RunDirectory:
    return prepare(
        resolved(tmp_path),
        identity=identity,
        fresh=fresh,
        environment={"launcher": "local", "world_size": 2},
        data={"sources": {"kjv": {"made_from": [{"licence": "public domain"}]}}},
    )


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    directory = start(tmp_path)
    assert directory.path == tmp_path / "first" and directory.checkpoints == tmp_path / "first" / "checkpoints"
    assert {entry.name for entry in directory.path.iterdir()} == {
        "identity.json", "config.yaml", "provenance.json", "environment.json", "data.json",
    }  # fmt: skip
    again = load(directory.path / "config.yaml")
    assert again.config == resolved(tmp_path).config
    assert yaml.safe_load((directory.path / "config.yaml").read_text())["name"] == "first"
    provenance = json.loads((directory.path / "provenance.json").read_text())
    assert provenance["name"] == {"value": "first", "source": "command line"}
    environment = json.loads((directory.path / "environment.json").read_text())
    assert environment["launcher"] == "local" and environment["world_size"] == 2
    assert environment["versions"]["megatron-core"].startswith("0.16.")


def test_the_same_run_resumes_under_another_layout_and_length(tmp_path: Path) -> None:
    start(tmp_path)
    config = resolved(tmp_path, "parallel.tensor_model_parallel_size=2", "train.train_iters=7")
    prepare(config, identity=IDENTITY, fresh=False, data={}, environment={})
    assert "train_iters: 7" in (tmp_path / "first" / "config.yaml").read_text()


def test_a_resume_keeps_what_it_replaces(tmp_path: Path) -> None:
    directory = start(tmp_path).path
    for iterations in (7, 8):
        changed = resolved(tmp_path, f"train.train_iters={iterations}")
        prepare(changed, identity=IDENTITY, fresh=False, data={}, environment={"launcher": "slurm"})
    lengths = [
        load(directory / name).config.train.train_iters for name in ("config.yaml.1", "config.yaml.2", "config.yaml")
    ]
    assert lengths == [resolved(tmp_path).config.train.train_iters, 7, 8]
    launchers = [json.loads((directory / f"environment.json.{number}").read_text())["launcher"] for number in (1, 2)]
    assert launchers == ["local", "slurm"]
    source = json.loads((directory / "provenance.json.1").read_text())["train.train_iters"]["source"]
    assert source == "default"


def test_a_resume_that_changes_nothing_leaves_no_copies(tmp_path: Path) -> None:
    names = {entry.name for entry in start(tmp_path).path.iterdir()}
    assert {entry.name for entry in start(tmp_path).path.iterdir()} == names


def test_another_precision_is_refused_by_name(tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(CheckpointError, match=r"precision\.bf16: false there, true now"):
        prepare(resolved(tmp_path, "precision.bf16=true"), identity=IDENTITY, fresh=False, data={}, environment={})


def test_a_start_interrupted_before_its_first_rename_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / ".identity.json.partial").write_text('{"ident')
    assert (start(tmp_path).path / "identity.json").exists()
    assert not (tmp_path / "first" / ".identity.json.partial").exists()


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    start(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    other = {
        **IDENTITY,
        "model": {"hidden_size": 256, "num_layers": 2, "swiglu": True},
        "data": {**IDENTITY["data"], "dataset_digest": "def"},
    }
    with pytest.raises(CheckpointError) as caught:
        start(tmp_path, other)
    message = str(caught.value)
    assert 'data.dataset_digest: "abc" there, "def" now' in message
    assert "model.hidden_size: 128 there, 256 now" in message
    assert "model.swiglu: absent there, true now" in message
    assert "num_layers" not in message and "seed:" not in message
    assert "name=" in message and "--fresh" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == before, "nothing was changed"


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        directory = start(tmp_path, {**IDENTITY, "seed": seed}, fresh=True)
        directory.checkpoints.mkdir()
    seeds = {
        path.name: json.loads((path / "identity.json").read_text())["fields"]["seed"] for path in tmp_path.iterdir()
    }
    assert seeds == {"first.1": 1, "first.2": 2, "first": 3}
    assert (tmp_path / "first.1" / "checkpoints").is_dir()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"first exists but holds no run"):
        start(tmp_path)


def test_a_disk_that_takes_no_more_is_one_sentence(tmp_path: Path) -> None:
    told = r"first cannot be written \(File too large\); make room there"
    with full_disk(), pytest.raises(CheckpointError, match=told):
        start(tmp_path)


def test_a_file_where_runs_lie_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(CheckpointError, match=r"first cannot be written \(Not a directory\)"):
        start(tmp_path / "runs")


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    assert (start(tmp_path).path / "identity.json").exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("x")
    with pytest.raises(CheckpointError, match="holds no run"):
        start(tmp_path)


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "first" / "identity.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"identity\.json is damaged"):
        start(tmp_path)


def test_identity_does_not_depend_on_order_and_does_on_every_field() -> None:
    assert digest(IDENTITY) == digest(dict(reversed(IDENTITY.items())))
    assert digest(IDENTITY) != digest({**IDENTITY, "seed": 1235})


def test_tuples_survive_the_file(tmp_path: Path) -> None:
    fields = {**IDENTITY, "model": {"modules": ("core_attn",)}}
    start(tmp_path, fields)
    assert start(tmp_path, fields).path.exists(), "a tuple read back as a list is the same identity"


def test_surroundings_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = surroundings()
    assert found["git"] is None
    assert found["cpu_cores"] >= 1 and found["memory_bytes"] > 1 << 20
    json.dumps(found)
