"""Which rank this process is, as its launcher says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_slm.errors import LaunchError
from megatron_slm.launch import mpi

Launcher = Literal["local", "torchrun", "slurm", "mpi"]

LAUNCHER_VARIABLE = "MSLM_LAUNCHER"
SLOT_VARIABLE = "MSLM_SLOT"
"""The slot of a rank, for the rank itself to read: the place of its process, counted as its launcher does."""
ROTATION_VARIABLE = "MSLM_ROTATE_RANKS"
"""So many places further on than its launcher has put it every rank is run; its data and groups stay its own."""
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI_VARIABLES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_MEETING_POINT = (
    "use launch/slurm.sh, or export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) and "
    "MASTER_PORT=29500 before srun"
)
# SLURM_MAX_NORMAL_STEP_ID: from here on Slurm numbers its own steps (shell of salloc, batch script, extern).
_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnvironment:
    """One rank's place in the job, and where the ranks meet.

    ``local_*`` count the ranks on this rank's machine. ``master_addr:master_port`` is where rank 0 listens. ``slot`` is
    the place of the process among all of the job: its launcher's rank, which is also this rank unless they are rotated.
    ``local_rank`` goes with the slot: it says which device is this process's.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher
    slot: int = -1

    def __post_init__(self) -> None:
        if self.slot < 0:
            object.__setattr__(self, "slot", self.rank)
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(f"rank {self.rank} is not within the world of {self.world_size} ranks ({self.launcher})")
        if not 0 <= self.local_rank < self.local_world_size:
            raise LaunchError(
                f"local rank {self.local_rank} is not within the {self.local_world_size} ranks of its machine "
                f"({self.launcher})"
            )
        if not 0 < self.master_port < 65536:
            raise LaunchError(f"MASTER_PORT={self.master_port} is not a port number (1 to 65535)")

    def to_environ(self) -> dict[str, str]:
        """The variables that torch (``init_method="env://"``) and ``from_environment`` read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            LAUNCHER_VARIABLE: self.launcher,
            SLOT_VARIABLE: str(self.slot),
        }


def from_environment(environ: Mapping[str, str]) -> RankEnvironment | None:
    """Read the rank from ``environ``: torch's variables first, then a Slurm step, then MPI.

    Under MPI this is where ``MPI_Init`` happens: rank 0 chooses the meeting point and broadcasts it.

    Returns:
        None where no launcher started this process: ``mslm`` then starts the ranks itself.

    Raises:
        LaunchError: a launcher started this process but a variable is missing or not a number.
    """
    found = _as_launched(environ)
    if found is None:
        return None
    if SLOT_VARIABLE in environ:  # whoever has set it has chosen the rank too
        return replace(found, slot=_integer(environ, SLOT_VARIABLE))
    return rotated(found, rotation(environ) or 0)


def rotation(environ: Mapping[str, str]) -> int | None:
    """Places by which ranks are moved on; None where nobody has asked.

    Raises:
        LaunchError: it is not a whole number.
    """
    return _integer(environ, ROTATION_VARIABLE) if environ.get(ROTATION_VARIABLE) else None


def rotated(launched: RankEnvironment, places: int) -> RankEnvironment:
    """Who a process is when rank r is run by slot (r + ``places``) modulo the number of ranks.

    On several machines MASTER_ADDR must then name the one that runs rank 0: that of slot ``places``.

    Args:
        launched: as its launcher has counted it; its rank is the slot.
    """
    return replace(launched, rank=(launched.rank - places) % launched.world_size, slot=launched.rank)


def _as_launched(environ: Mapping[str, str]) -> RankEnvironment | None:
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torch(environ)
    if _is_slurm_rank(environ):
        return _from_slurm(environ)
    for rank_name, size_name in _MPI_VARIABLES:
        if rank_name in environ or size_name in environ:
            _require(environ, (rank_name, size_name), "an MPI launcher")
            fields = mpi.join(environ, world_size=_integer(environ, size_name))
            return RankEnvironment(**fields, launcher="mpi")
    return None


def _from_torch(environ: Mapping[str, str]) -> RankEnvironment:
    named = environ.get(LAUNCHER_VARIABLE, "torchrun")
    launcher: Launcher = next((known for known in get_args(Launcher) if known == named), "torchrun")
    _require(environ, _TORCH_VARIABLES, "torchrun (or a script that sets its variables)")
    _require_new_store(environ)
    world_size = _integer(environ, "WORLD_SIZE")
    return RankEnvironment(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        # Scripts that export the variables by hand often leave this one out; it is taken for one machine then.
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world_size,
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        launcher=launcher,
    )


def _require_new_store(environ: Mapping[str, str]) -> None:
    """Refuse a torchrun whose restarted ranks would read the addresses of the dead ones (torch 2.13).

    Its agent keeps one store for all restarts, and torch puts every rank's address there under the same name.

    Raises:
        LaunchError: names the variable.
    """
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise LaunchError(
            f"torchrun --max-restarts={restarts} keeps one store for all restarts, where the new ranks would meet the "
            "addresses of the dead ones. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun (--rdzv-backend=c10d or "
            "--standalone), or leave --max-restarts out."
        )


def _is_slurm_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of an ``srun`` step.

    A batch script, the shell of ``salloc`` and ``srun --pty bash`` carry Slurm's variables too, but no rank waits for
    them: there ``mslm`` starts the ranks itself, as it does in a step of one task.
    """
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= environ.keys() or "SLURM_PTY_PORT" in environ:
        return False
    if _integer(environ, "SLURM_STEP_ID") >= _FIRST_RESERVED_SLURM_STEP:
        return False
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
    if tasks == "1" or tasks != environ.get("SLURM_NTASKS", tasks):
        return False
    # `mpirun` inside an allocation starts one proxy a node with srun; the ranks below inherit the proxy's variables.
    for rank_name, size_name in _MPI_VARIABLES:
        if rank_name in environ and (environ[rank_name], environ.get(size_name)) != (environ["SLURM_PROCID"], tasks):
            return False
    return True


def _from_slurm(environ: Mapping[str, str]) -> RankEnvironment:
    names = ("SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
    _require(environ, names, "srun", way_out=_MEETING_POINT)
    world_size = _integer(environ, "SLURM_NTASKS")
    return RankEnvironment(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_this_node(environ, world_size),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        launcher="slurm",
    )


def _tasks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """Entry SLURM_NODEID of SLURM_STEP_TASKS_PER_NODE, which Slurm writes as ``4(x2),3``."""
    written = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if written is None:
        return world_size
    counts: list[int] = []
    for part in written.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={written!r} is not a list such as '4(x2),3'")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={written!r} lists {len(counts)} node(s)")
    return counts[node]


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str, way_out: str = "set it") -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        present = [f"{name}={environ[name]}" for name in names if name in environ]
        raise LaunchError(
            f"this process looks started by {launcher} ({', '.join(present) or 'a step of several tasks'}), but "
            f"{', '.join(missing)} is not set; {way_out}, or unset the others and let mslm start the ranks"
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} is not a whole number") from None
