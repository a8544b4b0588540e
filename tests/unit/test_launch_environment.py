"""Which rank a process is, for each launcher's variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megatron_slm.errors import LaunchError
from megatron_slm.launch.environment import RankEnvironment, from_environment
from megatron_slm.launch.local import threads_per_rank
from megatron_slm.launch.port import reserve_port
from megatron_slm.launch.signals import StopRequest

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "MASTER_ADDR": "10.0.0.2",
    "MASTER_PORT": "20007",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun() -> None:
    expected = RankEnvironment(5, 8, 1, 4, "10.0.0.1", 29500, "torchrun")
    assert from_environment(TORCHRUN) == expected, "torchrun's six variables say it all"
    assert from_environment({**SRUN, **TORCHRUN}) == expected, "torchrun inside a Slurm step is torchrun"


def test_torchrun_with_restarts_needs_a_new_store_for_each() -> None:
    """tests/cluster/test_launchers.py kills a rank under it; without the variable the restarted ranks never meet."""
    elastic = {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(LaunchError, match="--max-restarts=3 .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        from_environment(elastic)
    for allowed in ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}):
        assert from_environment({**elastic, **allowed}) is not None


def test_torchrun_without_local_world_size_is_one_machine() -> None:
    environment = from_environment(without(TORCHRUN, "LOCAL_WORLD_SIZE"))
    assert environment is not None and environment.local_world_size == 8, "hand-written scripts leave it out"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torchrun_names_what_is_missing(missing: str) -> None:
    with pytest.raises(LaunchError, match=rf"but {missing} is not set"):
        from_environment(without(TORCHRUN, missing))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "8", "rank 8 is not within the world of 8 ranks"),
        ("RANK", "first", "RANK='first' is not a whole number"),
        ("LOCAL_RANK", "4", "local rank 4 is not within the 4 ranks"),
        ("MASTER_PORT", "0", "MASTER_PORT=0 is not a port number"),
    ],
)
def test_impossible_values_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        from_environment({**TORCHRUN, name: value})


@pytest.mark.parametrize("launcher", ["local", "torchrun", "slurm", "mpi"])
def test_exported_variables_read_back_as_the_same_rank(launcher: str) -> None:
    environment = RankEnvironment(2, 4, 0, 2, "127.0.0.1", 4711, launcher)  # type: ignore[arg-type]
    assert from_environment(environment.to_environ()) == environment, "to_environ and from_environment are inverse"


def test_srun_step() -> None:
    assert from_environment(SRUN) == RankEnvironment(9, 11, 1, 3, "10.0.0.2", 20007, "slurm"), "third node has 3 tasks"
    with_pmi2 = {**SRUN, "PMI_RANK": "9", "PMI_SIZE": "11"}
    assert from_environment(with_pmi2) == from_environment(SRUN), "srun --mpi=pmi2 is still srun"


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_srun_names_what_is_missing(missing: str) -> None:
    with pytest.raises(LaunchError, match=rf"but {missing} is not set"):
        from_environment(without(SRUN, missing))


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="plain shell"),
        pytest.param({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, id="exported meeting point alone"),
        pytest.param(without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), id="batch script"),
        pytest.param(without(SRUN, "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"), id="salloc on the login node"),
        pytest.param({**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, id="salloc on a node"),
        pytest.param({**SRUN, "SLURM_PTY_PORT": "40000"}, id="srun --pty bash"),
        pytest.param({**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, id="one task"),
        pytest.param({**SRUN, "SLURM_STEP_NUM_TASKS": "2"}, id="a step of other size"),
    ],
)
def test_no_launcher(environ: dict[str, str]) -> None:
    assert from_environment(environ) is None, "nobody waits for this process as a rank"


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({"PMI_RANK": "0"}, "PMI_SIZE"),
        ({"PMI_SIZE": "4"}, "PMI_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_incomplete_mpi_names_what_is_missing(environ: dict[str, str], missing: str) -> None:
    with pytest.raises(LaunchError, match=rf"but {missing} is not set"):
        from_environment(environ)


@pytest.mark.parametrize("prefix", ["PMI_{}", "OMPI_COMM_WORLD_{}"])
def test_another_mpi_than_the_one_that_started_us_is_refused(prefix: str) -> None:
    """The variables claim 3 ranks to an MPI library that nobody started: it sees one."""
    program = (
        "import sys; from megatron_slm.launch.environment import from_environment; from_environment(eval(sys.argv[1]))"
    )
    environ = {prefix.format("RANK"): "0", prefix.format("SIZE"): "3"}
    ended = subprocess.run(
        [sys.executable, "-c", program, repr(environ)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert "LaunchError: mpirun started 3 ranks but mpi4py sees 1" in ended.stderr, (
        f"the mismatch is named: {ended.stderr}"
    )


def test_launch_imports_no_torch() -> None:
    modules = "environment, kinship, local, mpi, port, rank, report, signals, supervise"
    program = (
        f"import sys; from megatron_slm.launch import {modules}; "
        "sys.exit('torch' in sys.modules or 'mpi4py.MPI' in sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run([sys.executable, "-c", program], check=False, env=environ)
    assert ended.returncode == 0, "the launcher's parent stays light until it preloads"


def test_reserved_port_is_nobody_elses_until_it_is_listened_on() -> None:
    import socket

    with reserve_port("127.0.0.1") as reserved:
        port = reserved.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("", port))
            store.listen()


def test_threads_per_rank_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1) == cores, "one rank has all cores"
    assert threads_per_rank(10 * cores) == 1, "a rank has at least one thread"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_request_remembers_and_restores(number: signal.Signals) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C
    try:
        with StopRequest() as stop:
            assert not stop.requested and stop.signal_name is None, "nobody has asked yet"
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested and stop.signal_name == number.name, "the first signal is the reason"
        assert signal.getsignal(number) is signal.SIG_DFL, "the handler from before is back"
    finally:
        signal.signal(number, outside)


def test_stop_request_leaves_an_ignored_ctrl_c_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested, "the parent of the ranks answers Ctrl-C, not each rank"
    finally:
        signal.signal(signal.SIGINT, before)
