"""What a Slurm job has of the cluster: from the options that it is asked for with, or from inside it."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_slm.errors import LaunchError

_PATIENCE_S = 60.0
_NO_LIMIT_MINUTES = 364.0 * 24 * 60
"""Slurm gives a job without a limit a year."""
_UNREAD = {
    "-G --gpus": "--gpus-per-node",
    "--gpus-per-task": "--gpus-per-node",
    "--mem-per-cpu": "--mem",
    "--mem-per-gpu": "--mem",
}
"""Options of ``sbatch`` that leave it open what a node gives, and those that say it."""
_UNITS_MB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True)
class Allocation:
    """Nodes, and what each of them gives.

    Attributes:
        gpu: type of the GPUs as Slurm names it; None where it does not.
        memory_mb: of one node, in MiB as Slurm counts; None where it is not known.
    """

    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    gpu: str | None = None
    memory_mb: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        """Where the ranks compute."""
        return "cuda" if self.gpus_per_node else "cpu"

    def __post_init__(self) -> None:
        if self.gpus_per_node and self.ranks_per_node != self.gpus_per_node:
            raise LaunchError(
                f"{self.gpus_per_node} GPUs and {self.ranks_per_node} tasks on a node: every rank has one GPU. Give "
                f"--ntasks-per-node={self.gpus_per_node}, or ask for as many GPUs as ranks."
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"the options of sbatch, before CONFIG: {message}.")


def of_options(options: Sequence[str]) -> Allocation:
    """The allocation that options of ``sbatch`` ask for.

    Raises:
        LaunchError: they leave the number of nodes or ranks open.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-N", "--nodes", default="1")
    parser.add_argument("-n", "--ntasks", type=int)
    parser.add_argument("--ntasks-per-node", type=int)
    parser.add_argument("--gpus-per-node")
    parser.add_argument("--gres", default="")
    parser.add_argument("--mem")
    parser.add_argument("-p", "--partition")
    for option in _UNREAD:
        parser.add_argument(*option.split())
    own, _ = parser.parse_known_args(list(options))
    unread = [option for option in _UNREAD if getattr(own, option.split()[-1][2:].replace("-", "_")) is not None]
    if unread:
        raise LaunchError(
            f"{unread[0].split()[-1]} does not say what one node gives, which decides whether the job fits: give "
            f"{_UNREAD[unread[0]]} instead."
        )
    if not own.nodes.isdecimal() or int(own.nodes) < 1:
        raise LaunchError(f"--nodes={own.nodes}: give one number; the layout of a run needs to know its ranks.")
    gpu, gpus = _gpus(own.gpus_per_node or _gpu_of_gres(own.gres))
    ranks = own.ntasks_per_node or gpus
    if not ranks and own.ntasks:
        ranks = per_node(own.ntasks, int(own.nodes))
    memory_mb = _megabytes(own.mem) if own.mem else _partition_memory_mb(own.partition)
    return Allocation(int(own.nodes), ranks or 1, gpus, gpu, memory_mb)


def of_environment(environ: Mapping[str, str]) -> Allocation:
    """The allocation that this process is in.

    Raises:
        LaunchError: the ranks cannot be shared out evenly, or there are GPUs without one.
    """
    nodes = int(environ.get("SLURM_JOB_NUM_NODES") or environ["SLURM_NNODES"])
    gpus = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    asked = environ.get("SLURM_NTASKS_PER_NODE", "").partition("(")[0]
    ranks = int(asked) if asked else per_node(int(environ.get("SLURM_NTASKS") or nodes), nodes)
    gpu, _ = _gpus(environ.get("SLURM_GPUS_PER_NODE"))
    given = int(environ.get("SLURM_MEM_PER_NODE") or 0)
    return Allocation(nodes, ranks, gpus, gpu, given or _nodes_memory_mb(environ["SLURM_JOB_NODELIST"]))


def per_node(tasks: int, nodes: int) -> int:
    """Tasks of each node.

    Raises:
        LaunchError: the nodes would have different numbers.
    """
    if tasks % nodes:
        raise LaunchError(f"{tasks} tasks on {nodes} nodes: give every node as many, with --ntasks-per-node.")
    return tasks // nodes


def first_address(nodes: str) -> str:
    """Address of the first of a list of nodes as Slurm writes it. A node's name need not resolve; its NodeAddr does."""
    first = asked(["scontrol", "show", "hostnames", nodes]).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", asked(["scontrol", "--oneliner", "show", "node", first]))
    return found[1] if found else first


def minutes_left(job: str) -> float | None:
    """Until the job's time limit; None where it has none."""
    text = asked(["squeue", "--noheader", f"--jobs={job}", "--format=%L"]).strip()
    minutes = minutes_of(text)
    return minutes if minutes is not None and minutes < _NO_LIMIT_MINUTES else None


def minutes_of(text: str) -> float | None:
    """Slurm's ``days-hours:minutes:seconds`` in minutes, with or without its front; None for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 60 * (24 * days + hours) + minutes + seconds / 60


def asked(command: Sequence[str]) -> str:
    """What a program of Slurm answers.

    Raises:
        LaunchError: it is missing, fails or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise LaunchError(f"there is no {command[0]} on PATH: this machine has no Slurm. Use its login node.")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{' '.join(command)} has not answered for {_PATIENCE_S:.0f} s: is slurmctld there?"
        ) from None
    if done.returncode:
        raise LaunchError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _gpus(text: str | None) -> tuple[str | None, int]:
    """``h100:8`` or ``8`` -> type and number."""
    name, _, number = (text or "0").rpartition(":")
    if not number.isdecimal():
        raise LaunchError(f"{text!r} GPUs: write a number, or TYPE:NUMBER.")
    return name or None, int(number)


def _gpu_of_gres(gres: str) -> str | None:
    """The part of ``--gres`` that is of GPUs: ``gpu:h100:8`` -> ``h100:8``."""
    for part in gres.split(","):
        kind, _, rest = part.partition(":")
        if kind == "gpu":
            return rest or "1"
    return None


def _megabytes(text: str) -> int | None:
    """``16G`` -> MiB; 0 is the whole node, whatever it has."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    if found is None:
        raise LaunchError(f"--mem={text} is no size such as 64G.")
    return int(int(found[1]) * _UNITS_MB[found[2] or "M"]) or None


def _partition_memory_mb(partition: str | None) -> int | None:
    """Memory of the smallest node of a partition; of the default one where none is named."""
    if partition is None:
        for name in asked(["sinfo", "--noheader", "--format=%P"]).split():
            partition = name.removesuffix("*") if name.endswith("*") else partition
    named = [] if partition is None else [f"--partition={partition}"]
    return _least(asked(["sinfo", "--noheader", "--Node", "--format=%m", *named]))


def _nodes_memory_mb(nodes: str) -> int | None:
    return _least(asked(["sinfo", "--noheader", "--Node", "--format=%m", f"--nodes={nodes}"]))


def _least(text: str) -> int | None:
    return min((int(size.rstrip("+")) for size in text.split()), default=None)
