"""Which checkpoint a run resumes from when the newest is not what was saved, and which ones stay."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest, publish
from megatron_slm.train.checkpoint_report import listing, verified
from megatron_slm.train.recovery import find, newest_whole
from megatron_slm.train.retention import Retention
from megatron_slm.train.saved_state import SavedState, read_state

MINE, THEIRS = "a" * 64, "b" * 64


def save(checkpoints: Path, step: int, *, identity: str = MINE, retention: Retention | None = None) -> Path:
    """A checkpoint whose payload is a few bytes."""
    temporary = publish.begin(checkpoints, step)
    for name in manifest.REQUIRED:
        (temporary / name).touch()
    (temporary / "__0_0.distcp").write_bytes(bytes([step]) * 1000)
    state = SavedState(
        step=step, consumed_samples=8 * step, cursor={}, layout={}, params_dtype="float32", tokenizer_hash=""
    )
    (temporary / "state.json").write_text(state.to_json())
    final = publish.checkpoint_path(checkpoints, step)
    publish.publish(temporary, final, identity=identity)
    if retention is not None:
        retention.apply(checkpoints, step)
    return final


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_run(checkpoint: Path) -> None:
    """The same step of another run takes the checkpoint's place, whole."""
    other = save(checkpoint.parent.parent / "other", int(checkpoint.name.removeprefix("iter_")), identity=THEIRS)
    shutil.rmtree(checkpoint)
    other.rename(checkpoint)


def rename_directory(checkpoint: Path) -> None:
    """The checkpoint of an earlier step under this one's name."""
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("iter_0000010"), checkpoint)


def edit(checkpoint: Path, **fields: object) -> None:
    """Other values in the manifest."""
    file = checkpoint / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def pipe(file: Path) -> None:
    """A reader of it would wait for a writer that never comes."""
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp has the sha256"),
    "flipped state": (lambda path: flip(path / "state.json"), "state.json has the sha256"),
    "truncated": (lambda path: (path / "__0_0.distcp").write_bytes(b"x"), "__0_0.distcp has 1 bytes, 1000 when saved"),
    "missing": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "renamed file": (lambda path: (path / "__0_0.distcp").rename(path / "__1_0.distcp"), "__0_0.distcp is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json is damaged"),
    "nested manifest": (lambda path: (path / "manifest.json").write_text("[" * 200_000), "manifest.json is damaged"),
    "endless step": (lambda path: edit(path, step=math.inf), "manifest.json is damaged (OverflowError"),
    "a manifest of nothing": (lambda path: edit(path, files={}), ".metadata is not listed in manifest.json"),
    "one file more": (lambda path: (path / "__1_0.distcp").touch(), "__1_0.distcp is not listed in manifest.json"),
    "a name of no file": (
        lambda path: edit(path, files={"\0": {"size": 1, "sha256": ""}}),
        "\0 cannot be read (embedded null byte)",
    ),
    "a pipe as manifest": (lambda path: pipe(path / "manifest.json"), "it is not a regular file"),
    "a pipe as shard": (lambda path: pipe(path / "__0_0.distcp"), "__0_0.distcp cannot be read (it is not a regular"),
    "of another run": (swap_run, "it is of another run"),
    "renamed directory": (rename_directory, "named after step 20, but it was saved after step 10"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, kind: str) -> None:
    kept, damaged = save(tmp_path / "run", 10), save(tmp_path / "run", 20)
    damage, told = DAMAGE[kind]
    damage(damaged)
    found = newest_whole(tmp_path / "run", identity=MINE)
    assert found is not None and found.path == kept and found.state.step == 10
    assert found.warning is not None and told in found.warning and "iter_0000020" in found.warning
    assert "Used instead: iter_0000010; the 10 steps after it will be made again." in found.warning


def test_the_newest_whole_one_is_used_without_a_word(tmp_path: Path) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    found = newest_whole(tmp_path, identity=MINE)
    assert found is not None and found.path == newest and found.warning is None
    assert newest_whole(tmp_path / "nothing", identity=MINE) is None


@pytest.mark.parametrize(
    ("tracker", "told"),
    [
        (b"\xffgarbage", "not the number of a step"),
        (b"30\n", "names step 30, which is not there"),
        (b"", "not the number of a step"),
        (None, "latest_checkpointed_iteration.txt is missing"),
    ],
)
def test_a_damaged_tracker_alone_costs_nothing(tmp_path: Path, tracker: bytes | None, told: str) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    (tmp_path / publish.TRACKER).unlink()
    if tracker is not None:
        (tmp_path / publish.TRACKER).write_bytes(tracker)
    found = newest_whole(tmp_path, identity=MINE)
    assert found is not None and found.path == newest
    assert found.warning is not None and told in found.warning


def test_a_tracker_that_was_set_back_is_obeyed(tmp_path: Path) -> None:
    first = save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / publish.TRACKER).write_text("10\n")
    found = newest_whole(tmp_path, identity=MINE)
    assert found is not None and found.path == first and found.warning is None


def test_without_a_whole_one_every_problem_is_listed(tmp_path: Path) -> None:
    for step in (10, 20):
        flip(save(tmp_path, step) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"(?s)no whole checkpoint.*iter_0000020: .*iter_0000010: .*--fresh"):
        newest_whole(tmp_path, identity=MINE)


def test_a_checkpoint_that_is_named_must_be_whole_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept, damaged = save(run / "checkpoints", 10), save(run / "checkpoints", 20)
    (damaged / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)damaged.*state\.json is missing"):
        find(damaged)
    for meaning_the_run in (run, run / "checkpoints"):
        found = find(meaning_the_run)
        assert found.path == kept and found.warning is not None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path)


def test_an_older_schema_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    stored = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**stored, "schema_version": 1}))
    with pytest.raises(CheckpointError, match="schema version 1, this program reads 2"):
        read_state(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"cursor": None}, {"cursor": []}, {"layout": None}, {"records": [1]}, {"records": {"guard": "x"}},
        {"records": {"guard": {"losses": 1}}}, {"records": {"guard": {"norms": ["x"]}}}, {"step": "1"}, {"parts": 1},
        {"unknown": 1},
    ],
)  # fmt: skip
def test_a_state_of_other_kinds_is_damaged(tmp_path: Path, fields: dict[str, object]) -> None:
    file = save(tmp_path, 10) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_state(file.parent)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "\udcff", "{"])
def test_a_state_that_is_no_record_is_damaged(tmp_path: Path, text: str) -> None:
    file = save(tmp_path, 10) / "state.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_state(file.parent)
    pipe(file)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(file.parent)


def steps(checkpoints: Path) -> list[int]:
    return list(publish.published(checkpoints))


def test_the_last_ones_and_the_round_ones_stay(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, retention=Retention(keep_last=2, interval=30))
    assert steps(tmp_path) == [30, 60, 70]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_by_default_all_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, retention=Retention())
    assert steps(tmp_path) == [1, 2, 3]


def test_nothing_goes_while_the_newest_is_not_whole(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "__0_0.distcp").unlink()
    Retention(keep_last=1).apply(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]


def test_later_steps_of_a_run_that_went_back_are_left_alone(tmp_path: Path) -> None:
    for step in (10, 20, 40):
        save(tmp_path, step)
    save(tmp_path, 30, retention=Retention(keep_last=1))
    assert steps(tmp_path) == [30, 40]


def test_a_removal_that_was_killed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20, retention=Retention(keep_last=1))
    monkeypatch.undo()
    assert steps(tmp_path) == [20]
    publish.begin(tmp_path, 30)
    assert not list(tmp_path.glob(".gone-*"))


def test_the_list_says_why_each_is_kept_and_verify_which_is_damaged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        save(run / "checkpoints", step)
    flip(run / "checkpoints" / "iter_0000010" / "__0_0.distcp")
    table = listing(run).splitlines()
    assert len(table) == 3 and "newest" in table[2] and "<- tracker" in table[2] and "yes" in table[2]
    lines = list(verified([run]))
    assert [sound for _, sound in lines] == [False, True] and "DAMAGED: __0_0.distcp" in lines[0][0]
    (run / "checkpoints" / "iter_0000010" / "__0_0.distcp").unlink()
    assert "NO: __0_0.distcp is missing" in listing(run)


def test_a_checkpoint_is_not_listed_as_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is one checkpoint, not a run: mslm checkpoint inspect"):
        listing(save(tmp_path, 10))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        listing(tmp_path / "nothing")


def test_the_manifest_names_step_and_run(tmp_path: Path) -> None:
    found = manifest.read_manifest(save(tmp_path, 7))
    assert (found.step, found.identity) == (7, MINE)
