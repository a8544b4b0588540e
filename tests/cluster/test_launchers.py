"""The same configuration under ``mpirun`` and ``torchrun``: the bits are those of ``srun`` over two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests import slurm
from tests.slurm import require_equal, steps, wait_until

BIN = Path(sys.executable).parent
MODULE = ("-m", "megatron_slm.cli", "train")


def test_mpirun_trains_the_same_run(config: Path, uninterrupted: Path) -> None:
    command = [str(BIN / "mpirun"), "-n", "4", sys.executable, *MODULE, config.name, "name=mpi"]
    done = subprocess.run(
        command, cwd=config.parent, env=slurm.environment(), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    require_equal(config.parent / "runs" / "mpi", uninterrupted)


def test_torchrun_starts_the_ranks_again_when_one_dies(config: Path, uninterrupted: Path) -> None:
    run = config.parent / "runs" / "elastic"
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=4", "--max-restarts=1"]
    with (config.parent / "elastic.txt").open("w") as out:
        agent = subprocess.Popen(
            [*torchrun, *MODULE, config.name, f"name={run.name}"],
            cwd=config.parent,
            env=slurm.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    said = Path(out.name)
    try:
        wait_until("a checkpoint and a step more", lambda: steps(run) >= 6, said.read_text)
        ranks = [one for one in psutil.Process(agent.pid).children() if "RANK" in one.environ()]
        os.kill(next(one.pid for one in ranks if one.environ()["RANK"] == "2"), signal.SIGKILL)
        assert agent.wait(240) == 0, said.read_text()
    finally:
        agent.kill()
        agent.wait()
    assert "Restart: 1" in (run / "progress.txt").read_text()
    require_equal(run, uninterrupted)
