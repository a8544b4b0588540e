"""A real Slurm of three nodes for the tests of this folder, where its packages are installed and the user is root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs, slurm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Lab]:
    """Up for the whole session, and down after it, however it ends."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no Slurm here ({', '.join(missing)} missing): make test-cluster installs it")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start jobs in the name of others, which needs root")
    directory = tmp_path_factory.mktemp("slurm") / "lab"
    try:
        slurm.lab_script("up", directory, slurm.NODES, os.getpid())
        yield slurm.Lab(directory)
    finally:
        slurm.lab_script("down", directory)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tiny model under TP2 x PP2 for forty steps, and its corpus beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    own = ("log.runs_dir=runs", f"data.data_path={runs.corpus(folder)}", *slurm.LAYOUT)
    assert subprocess.run([*slurm.MSLM, "check", *runs.TINY, *own], check=False).returncode == 0
    return slurm.write_config(folder / "tiny.yaml", (*runs.TINY, *own))


@pytest.fixture(scope="session")
def uninterrupted(lab: slurm.Lab, config: Path) -> Path:
    """The run of a job that nothing happened to."""
    job = lab.submitted(config, "whole")
    assert lab.ended(job) == "COMPLETED", lab.said(config, job)
    return config.parent / "runs" / "whole"
