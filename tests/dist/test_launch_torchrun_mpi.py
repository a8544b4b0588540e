"""The program of ``launch_program.py`` under the real ``torchrun`` and the real ``mpirun``, unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("launch_program.py")
BIN = Path(sys.executable).parent
PATIENCE_S = 120.0
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=4"],
    "mpirun": [str(BIN / "mpirun"), "-n", "4", sys.executable],
}


def launched(launcher: str, behaviour: str, directory: Path) -> subprocess.CompletedProcess[str]:
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_", "OMPI_", "SLURM_", "MSLM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [*LAUNCHERS[launcher], str(PROGRAM), behaviour, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_ranks_meet_and_sum(launcher: str, tmp_path: Path) -> None:
    ended = launched(launcher, "sum", tmp_path)
    assert ended.returncode == 0, f"the ranks work: {ended.stderr}"
    assert sorted(ended.stdout.splitlines()) == [f"rank {rank} got 6" for rank in range(4)], (
        "0 + 1 + 2 + 3 on each rank"
    )


@pytest.mark.parametrize("behaviour", ["raise", "sigkill"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_dead_rank_ends_the_run(launcher: str, behaviour: str, tmp_path: Path) -> None:
    ended = launched(launcher, behaviour, tmp_path)
    seconds = time.monotonic() - float((tmp_path / "death").read_text())
    assert ended.returncode != 0, "a dead rank is a failure"
    assert seconds < 10.0, f"the run ends within 10 s of the death, not {seconds:.1f} s"
    if behaviour == "raise":
        assert "mslm: rank 2 of 4 died: ValueError: the loss is not a number" in ended.stderr, f"named: {ended.stderr}"
        assert "in fail_with_others_waiting" in ended.stderr, f"with its traceback: {ended.stderr}"


@pytest.mark.parametrize("behaviour", ["refuse_all", "refuse_one"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_refused_input_is_said_once_without_traceback(launcher: str, behaviour: str, tmp_path: Path) -> None:
    ended = launched(launcher, behaviour, tmp_path)
    assert ended.returncode != 0, "a refused input is not success"
    assert ended.stderr.count("mslm: the corpus corpus.jsonl does not exist") == 1, f"said once: {ended.stderr}"
    assert "DataError" not in ended.stderr, f"the rank's traceback is not shown: {ended.stderr}"
    if launcher == "mpirun":
        assert ended.returncode == 2, "MPI's launcher hands the exit code on; torchrun always returns 1"
