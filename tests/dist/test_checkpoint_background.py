"""Saves beside the training: the same bytes as without, one at a time, and a disk that fails costs nothing."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_slm.train import manifest, publish
from tests import runs
from tests.ranks import RankFailure

DP2 = ("train.eval_iters=0", "log.tensorboard=false", "schedule.lr_decay_style=constant", "model.hidden_dropout=0.1")
ASYNC = "checkpoint.async_save=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Six steps, saved after every second, on the training thread."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert runs.train(run, data, 2, "train.train_iters=6", "checkpoint.save_interval=2", *DP2) == 0
    return run


def slow_disk() -> None:
    """Each wait for the disk takes longer than a step."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.15)
        real(descriptor)

    os.fsync = fsync


def small_files() -> None:
    """No file may pass 200 kB: the payload does, nothing else of the run."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def kill_at(event: str, path: str) -> None:
    """Let the rank that touches such a path be killed at that moment, by SIGKILL as kill -9 does."""

    def watch(seen: str, arguments: tuple[object, ...]) -> None:
        if seen == event and any(path in str(argument) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def files(checkpoint: Path) -> dict[str, bytes]:
    """All that should not depend on how it was saved; the configuration says how."""
    own = ("config.yaml", "manifest.json")
    return {file.name: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file() and file.name not in own}


def test_the_same_bytes_whatever_the_steps_meanwhile(tmp_path: Path, data: Path, straight: Path) -> None:
    """On a disk so slow that steps pass while a save is written, and that one save waits for the other."""
    run = tmp_path / "run"
    interval = "checkpoint.save_interval=2"
    assert runs.train(run, data, 2, "train.train_iters=6", interval, ASYNC, *DP2, plant=slow_disk) == 0
    for step in (2, 4, 6):
        assert files(runs.checkpoint_path(run, step)) == files(runs.checkpoint_path(straight, step))
        manifest.verify(runs.checkpoint_path(run, step))
    log = (run / "log.txt").read_text()
    assert re.search(r"iter_0000002 was saved in the background: .* published by step [34]", log)
    assert re.search(r"iter_0000004 was .* [1-9]\d* ms of them for the save before", log)
    assert log.index("saved " + str(runs.checkpoint_path(run, 2))) > log.index("iteration        3/")
    assert (run / "progress.txt").read_text().count("Saved checkpoint") == 3


def test_a_disk_that_takes_no_more_stops_the_run_and_costs_nothing(tmp_path: Path, data: Path, straight: Path) -> None:
    """Every rank ends at one step, with one sentence; the run resumed from the save before is the same run."""
    run = tmp_path / "run"
    options = ("train.train_iters=6", "checkpoint.save_interval=2", ASYNC, *DP2)
    assert runs.train(run, data, 2, *options, "train.exit_interval=2") == 75
    with pytest.raises(RankFailure, match="checkpoint of step 4 could not be written to .*File too large") as failure:
        runs.train(run, data, 2, *options, plant=small_files)
    assert failure.value.code == 1 and "Traceback" not in str(failure.value)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["iter_0000002"]
    manifest.verify(runs.checkpoint_path(run, 2))
    assert runs.train(run, data, 2, *options) == 0
    assert runs.losses(run) == runs.losses(straight)
    assert files(runs.checkpoint_path(run, 6)) == files(runs.checkpoint_path(straight, 6))


KILLS = {
    "rank 0 before it moves the second into its place": ("os.rename", "checkpoints/iter_0000004"),
    "rank 1 when it begins to write its part of the first": ("open", "__1_0.distcp"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_kill_9_in_a_save_in_the_background(tmp_path: Path, data: Path, straight: Path, moment: str) -> None:
    """What is there afterwards is whole, and the restarted run is the run that nobody killed."""
    run = tmp_path / "run"
    options = ("train.train_iters=6", "checkpoint.save_interval=2", ASYNC, *DP2)
    with pytest.raises(RankFailure, match="SIGKILL|signal 9"):
        runs.train(run, data, 2, *options, plant=partial(kill_at, *KILLS[moment]))
    there = publish.published(run / "checkpoints")
    assert list(there) == ([2] if "second" in moment else [])
    for checkpoint in there.values():
        manifest.verify(checkpoint)
    assert runs.train(run, data, 2, *options) == 0
    assert runs.losses(run) == runs.losses(straight)
    assert files(runs.checkpoint_path(run, 6)) == files(runs.checkpoint_path(straight, 6))


@contextlib.contextmanager
def on_a_small_disk(directory: Path, *, size_kib: int) -> Iterator[Path]:
    """Moves a directory to a file system of its own in memory; the test is skipped where none may be mounted."""
    aside = directory.with_name("aside")
    directory.rename(aside)
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(directory)]
    made = subprocess.run(mount, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        shutil.copytree(aside, directory, dirs_exist_ok=True)
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_full_and_read_only_file_systems(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=1", *DP2) == 0
    with on_a_small_disk(run / "checkpoints", size_kib=2500) as disk:
        for told in ("No space left on device", "Read-only file system"):
            with pytest.raises(RankFailure, match=f"checkpoint of step 2 could not be written .*{told}") as failure:
                runs.train(run, data, 1, "train.train_iters=2", *DP2)
            assert failure.value.code == 1 and "Traceback" not in str(failure.value)
            manifest.verify(runs.checkpoint_path(run, 1))
            assert list(publish.published(disk)) == [1] and not list(disk.glob(".tmp-iter_*"))
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
