"""A checkpoint is whole or it is not there: two phases, a manifest, and a process that is killed at random points."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest, publish

WRITER = """
import itertools, sys
from pathlib import Path
from megatron_slm.train import manifest, publish

directory, same_step = Path(sys.argv[1]), sys.argv[2] == "same"
tracker = directory / publish.TRACKER
for count in itertools.count(int(tracker.read_text()) if tracker.exists() else 1):
    step = 7 if same_step else count
    temporary = publish.begin(directory, step)
    (temporary / "shards").mkdir()
    for name in ("shards/a.distcp", "shards/b.distcp", "common.pt"):
        (temporary / name).write_bytes(bytes([count % 251]) * 50_000)
    for name in manifest.REQUIRED:
        (temporary / name).touch()
    publish.publish(temporary, publish.checkpoint_path(directory, step))
    print(step, flush=True)
"""


def save(directory: Path, step: int, content: bytes = b"weights") -> Path:
    temporary = publish.begin(directory, step)
    for name in manifest.REQUIRED:
        (temporary / name).touch()
    (temporary / "shards").mkdir()
    (temporary / "shards" / "__0_0.distcp").write_bytes(content)
    (temporary / "common.pt").write_bytes(b"common")
    final = publish.checkpoint_path(directory, step)
    publish.publish(temporary, final)
    return final


def test_the_layout_is_megatrons(tmp_path: Path) -> None:
    final = save(tmp_path / "checkpoints", 100)
    assert final.name == "iter_0000100"
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    files = json.loads((final / "manifest.json").read_text())["files"]
    assert set(files) == {*manifest.REQUIRED, "shards/__0_0.distcp"}
    assert files["common.pt"]["size"] == 6
    assert sorted(entry.name for entry in final.parent.iterdir()) == [final.name, publish.TRACKER]
    manifest.verify(final)


def test_nothing_is_latest_before_the_first_publish(tmp_path: Path) -> None:
    assert publish.latest(tmp_path / "absent") is None
    publish.begin(tmp_path, 5)
    assert publish.latest(tmp_path) is None


def test_the_tracker_counts_not_the_largest_directory(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / publish.TRACKER).write_text("1\n")
    assert publish.latest(tmp_path) == first


def test_leftovers_of_interrupted_saves_go_at_the_next_begin(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)
    interrupted = publish.begin(tmp_path, 2)
    (interrupted / "half").write_text("x")
    fresh = publish.begin(tmp_path, 2)
    assert fresh != interrupted and not interrupted.exists() and list(fresh.iterdir()) == []
    manifest.verify(kept)


def test_the_same_step_can_be_published_again(tmp_path: Path) -> None:
    save(tmp_path, 3, b"old")
    again = save(tmp_path, 3, b"new")
    assert (again / "shards" / "__0_0.distcp").read_bytes() == b"new"
    manifest.verify(again)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("new_is_there", [False, True])
def test_an_interrupted_replacement_is_settled(tmp_path: Path, new_is_there: bool) -> None:
    final = save(tmp_path, 3, b"old")
    replaced = tmp_path / ".old-iter_0000003-0123abcd"
    os.rename(final, replaced)
    assert publish.latest(tmp_path) == replaced, "the old one counts until the new one is in its place"
    manifest.verify(replaced)
    if new_is_there:
        other = tmp_path / "other"
        os.rename(save(other, 3, b"new"), final)
        assert publish.latest(tmp_path) == final
    publish.begin(tmp_path, 4)
    assert not replaced.exists()
    content = (final / "shards" / "__0_0.distcp").read_bytes()
    assert content == (b"new" if new_is_there else b"old")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
        (lambda path: (path / "common.pt").write_bytes(b"comm"), "common.pt has 4 bytes, 6 when saved"),
        (lambda path: (path / "shards" / "__0_0.distcp").write_bytes(b"weighty"), "shards/__0_0.distcp has the sha256"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"a"'), "manifest.json is damaged"),
        (
            lambda path: (path / "manifest.json").write_text('{"version": 2, "files": {"a": 1}}'),
            "manifest.json is damaged",
        ),
        (lambda path: (path / "manifest.json").write_text('{"files": {}, "version": 1}'), "version 1, this program"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, told: str) -> None:
    final = save(tmp_path, 9)
    assert callable(damage), "each case is a function"
    damage(final)
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        manifest.verify(final)
    assert str(final) in str(caught.value)


def test_every_damaged_file_is_named_at_once(tmp_path: Path) -> None:
    final = save(tmp_path, 9)
    (final / "common.pt").write_bytes(b"")
    (final / "shards" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)common\.pt has 0 bytes.*__0_0\.distcp is missing"):
        manifest.verify(final)


def test_without_hashes_only_presence_and_size_are_compared(tmp_path: Path) -> None:
    final = save(tmp_path, 9)
    (final / "shards" / "__0_0.distcp").write_bytes(b"weighty")
    manifest.verify(final, hashes=False)
    (final / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt is missing"):
        manifest.verify(final, hashes=False)


@pytest.mark.parametrize("text", ["release", "", "-1", "1.5"])
def test_a_tracker_without_a_step_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1)
    (tmp_path / publish.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match="not the number of a step; write the step of one of iter_0000001"):
        publish.latest(tmp_path)


def test_a_tracker_of_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / publish.TRACKER).write_text("2")
    with pytest.raises(CheckpointError, match=r"names step 2, .* does not exist; .* one of iter_0000001"):
        publish.latest(tmp_path)


@pytest.mark.parametrize("steps", ["ascending", "same"])
def test_killed_at_random_points_the_newest_whole_checkpoint_is_found(tmp_path: Path, steps: str) -> None:
    pauses = random.Random(steps)
    announced = 0
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path), steps]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None, "the writer announces what it has published"
            announced = max(announced, int(process.stdout.readline()))
            time.sleep(pauses.uniform(0.0, 0.03))
            process.send_signal(signal.SIGKILL)
            announced = max([announced, *(int(line) for line in process.stdout.read().split())])
        newest = publish.latest(tmp_path)
        assert newest is not None, "a checkpoint was announced"
        manifest.verify(newest)
        step = int((tmp_path / publish.TRACKER).read_text())
        assert announced <= step <= announced + 1, "at most the one whose announcement was cut off"
