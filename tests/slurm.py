"""What the tests in ``cluster`` need of Slurm: a laboratory on this machine, jobs in it, and nodes that die."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import runs

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "slurm.sh"
MSLM = (sys.executable, "-m", "megatron_slm.cli")
NODES = 3
LAYOUT = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "train.train_iters=40",
    "checkpoint.save_interval=5",
)
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
PATIENCE_S = 240.0
_OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "DEADLINE")


def lab_script(verb: str, directory: Path, *arguments: object) -> None:
    """``tools/slurm_lab.sh``; its daemons must not hold our output open."""
    command = [str(ROOT / "tools" / "slurm_lab.sh"), verb, str(directory), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def environment(**others: str) -> dict[str, str]:
    """Variables of somebody who types a command: none of a launcher, one thread as in every test."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PMI_", "OMPI_", "SLURM_", "MSLM_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    return {**own, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **others}


def write_config(path: Path, values: Sequence[str]) -> Path:
    """A configuration's file from ``section.key=value``."""
    sections: dict[str, list[str]] = {}
    for item in values:
        key, _, value = item.partition("=")
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"  {name}: {value}")
    path.write_text("".join(f"{section}:\n" + "\n".join(lines) + "\n" for section, lines in sections.items()))
    return path


def wait_until(what: str, condition: Callable[[], bool], said: Callable[[], str] = str) -> None:
    """Look ten times a second."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:.0f} s\n{said()}"
        time.sleep(0.1)


def steps(run: Path) -> int:
    """Steps that a run has made."""
    with contextlib.suppress(OSError, ValueError):
        return max(runs.losses(run), default=0)
    return 0


def require_equal(run: Path, other: Path) -> None:
    """Losses and everything in the last checkpoint agree to the last bit."""
    assert len(runs.losses(run)) == 40 and runs.losses(run) == runs.losses(other)
    first, second = (runs.contents(runs.checkpoint_path(one, 40)) for one in (run, other))
    assert runs.differences(first, second) == []


@dataclass(frozen=True)
class Lab:
    """A Slurm that is up."""

    directory: Path

    @property
    def environ(self) -> dict[str, str]:
        """Variables for its programs."""
        return environment(SLURM_CONF=str(self.directory / "slurm.conf"))

    def ask(self, *command: str, cwd: Path | None = None, **others: str) -> subprocess.CompletedProcess[str]:
        """Run a program of it."""
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**self.environ, **others}, timeout=120
        )

    def submitted(
        self, config: Path, name: str, *overrides: str, options: Sequence[str] = TWO_BY_TWO, **others: str
    ) -> str:
        """A job by ``sbatch launch/slurm.sh``; returns its number. Checked before, unless ``others`` say so."""
        command = ["sbatch", "--parsable", *options, str(SCRIPT), config.name, f"name={name}", *overrides]
        done = self.ask(*command, cwd=config.parent, **{"MSLM_CHECKED": "4", **others})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job; of an array, all that differ."""
        states = self.ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").stdout.split()
        return " ".join(dict.fromkeys(states))

    def ended(self, job: str) -> str:
        """Wait until a job is over. Returns its state."""

        def over() -> bool:
            states = self.state(job).split()
            return bool(states) and all(one in _OVER for one in states)

        wait_until(f"the end of job {job}", over, lambda: self.ask("scontrol", "show", "job", job).stdout)
        return self.state(job)

    def said(self, config: Path, job: str) -> str:
        """The output of a job."""
        return (config.parent / f"slurm-{job}.out").read_text()

    def kill_node(self, node: str) -> None:
        """What the loss of power does: slurmd, and everything that it has started, is gone at once."""
        victims: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if environ.get("SLURM_CONF") != self.environ["SLURM_CONF"]:
                    continue
                if process.name() == "slurmd" and process.cmdline()[-1] == node:
                    victims.add(process)
                if environ.get("SLURMD_NODENAME") == node:
                    # Of the ranks the parent is slurmstepd, which knows the node only by what it was told.
                    victims |= {process, *(one for one in process.parents() if one.name().startswith("slurmstepd"))}
        assert len(victims) >= 3, f"slurmd, slurmstepd and ranks of {node}, not {victims}"
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def kill_rank(self, job: str, rank: int) -> None:
        """End one rank of a job as the kernel does when memory runs out."""
        own = {"SLURM_CONF": self.environ["SLURM_CONF"], "SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                if parent is None or not parent.name().startswith("slurmstepd"):
                    continue
                environ = process.environ()
                if "SLURM_STEP_NODELIST" in environ and own.items() <= environ.items():
                    process.kill()
                    return
        raise AssertionError(f"rank {rank} of job {job} is not there")
