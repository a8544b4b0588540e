"""Ranks started by ``mpirun``: MPI says who is who, torch does everything after that."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from megatron_slm.errors import LaunchError
from megatron_slm.launch.port import reserve_port


def join(environ: Mapping[str, str], *, world_size: int) -> dict[str, Any]:
    """This process's rank from MPI; rank 0's address and a free port of it come by broadcast. Collective.

    Returns the fields of a ``RankEnvironment`` but its launcher.

    Args:
        environ: MASTER_ADDR in it, if any, is rank 0's address for ranks on several machines.
        world_size: ranks that ``mpirun`` says it started.

    Raises:
        LaunchError: mpi4py is missing, finds no MPI library, or loads another MPI than the one that started us.
    """
    mpi = load_mpi()
    world = mpi.COMM_WORLD
    if world.Get_size() != world_size:
        raise LaunchError(
            f"mpirun started {world_size} ranks but mpi4py sees {world.Get_size()}: it loaded another MPI library "
            f"({mpi.Get_library_version().splitlines()[0]}); use the mpirun of that library"
        )
    rank = world.Get_rank()
    machine = world.Split_type(mpi.COMM_TYPE_SHARED, key=rank)
    everyone_here = machine.Get_size() == world_size
    meeting = None
    if rank == 0:
        address = environ.get("MASTER_ADDR") or ("127.0.0.1" if everyone_here else socket.gethostname())
        reserved = reserve_port("127.0.0.1" if everyone_here else "")
        meeting = (address, reserved.getsockname()[1])
        # Left open on purpose until the process ends: nobody else is given the port, and torch may still bind it.
        reserved.detach()
    address, port = world.bcast(meeting, root=0)
    fields = {
        "rank": rank,
        "world_size": world_size,
        "local_rank": machine.Get_rank(),
        "local_world_size": machine.Get_size(),
        "master_addr": address,
        "master_port": port,
    }
    machine.Free()
    return fields


def load_mpi() -> Any:
    """The module ``mpi4py.MPI``; importing it initialises MPI.

    Raises:
        LaunchError: mpi4py is missing or finds no MPI library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpirun started this process, but mpi4py cannot be used ({error}); pip install mpi4py mpich, or start "
            "with mslm train or torchrun"
        ) from error
    return MPI
