"""The command that starts the ranks of a Slurm job: ``srun``, with or without a container."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping, Sequence

from megatron_slm.errors import LaunchError
from megatron_slm.launch.allocation import Allocation

# Not --kill-on-bad-exit: the first rank to leave after a clean stop (75) would end the others on their way out.
_SETTLE_S = 30
"""What the other ranks are given once the first has ended, to tell their own reason."""
_LOWEST_PORT, _PORTS, _TRIES = 20000, 10000, 20


def step_command(allocation: Allocation, program: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """``srun`` of ``program``, one process for each rank, every line of output with its rank before it.

    Args:
        environ: MSLM_CONTAINER and MSLM_CONTAINER_MOUNTS name an image and what of the machine it sees.

    Raises:
        LaunchError: the image needs a program that is not there.
    """
    command = ["srun", "--label", "--kill-on-bad-exit=0", f"--wait={_SETTLE_S}"]
    command += [f"--nodes={allocation.nodes}", f"--ntasks={allocation.world_size}"]
    command += [f"--ntasks-per-node={allocation.ranks_per_node}", "--distribution=block"]
    if cpus := environ.get("SLURM_CPUS_PER_TASK"):
        # Since 22.05 srun does not take it over from sbatch, and every rank would have one processor.
        command.append(f"--cpus-per-task={cpus}")
    if allocation.gpus_per_node:
        # Each rank finds its GPU by its place on the node; with one visible alone they could not exchange directly.
        command.append("--gpu-bind=none")
    if not (image := environ.get("MSLM_CONTAINER")):
        return [*command, *program]
    mounts = environ.get("MSLM_CONTAINER_MOUNTS", "")
    options, inside = container(image, mounts, program, gpus=allocation.gpus_per_node > 0)
    return [*command, *options, *inside]


def container(image: str, mounts: str, program: Sequence[str], *, gpus: bool) -> tuple[list[str], list[str]]:
    """How a program is run inside an image: options for ``srun`` (pyxis), and the command (apptainer).

    Args:
        image: a file ``.sif`` or a directory is apptainer's (or singularity's), anything else pyxis'.
        mounts: ``PATH[:PATH_INSIDE]``, separated by commas; the working directory is always among them.

    Raises:
        LaunchError: neither apptainer nor singularity is there for the file.
    """
    here = os.getcwd()
    places = [here, *filter(None, mounts.split(","))]
    if not (image.endswith(".sif") or os.path.isdir(image)):
        mounted = ",".join(place if ":" in place else f"{place}:{place}" for place in places)
        options = [f"--container-image={image}", f"--container-mounts={mounted}", f"--container-workdir={here}"]
        return options, list(program)
    runner = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if runner is None:
        raise LaunchError(f"MSLM_CONTAINER={image} needs apptainer or singularity on PATH, and neither is there.")
    devices = ["--nv"] if gpus else []
    binds = [argument for place in places for argument in ("--bind", place)]
    return [], [runner, "exec", *devices, *binds, "--pwd", here, image, *program]


def meeting_port(address: str, job: int, restarts: int) -> int:
    """A port for rank 0: another for every job and restart, and free where this process can tell."""
    for attempt in range(_TRIES):
        port = _LOWEST_PORT + (7 * job + restarts + 101 * attempt) % _PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
        return port
    raise LaunchError(f"no port of {address} is free among {_TRIES} that were tried; set MASTER_PORT.")
