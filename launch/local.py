"""Starts the ranks of a run on this machine: forked from one warm parent on CPU, fresh interpreters on CUDA."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_slm.errors import LaunchError
from megatron_slm.launch.environment import RankEnvironment, rotated, rotation
from megatron_slm.launch.kinship import adopt_and_end_orphans, die_with_parent
from megatron_slm.launch.port import reserve_port
from megatron_slm.launch.rank import REPORT_VARIABLE, run_and_report
from megatron_slm.launch.signals import STOP_SIGNALS
from megatron_slm.launch.supervise import EXIT_STOPPED, RankProcess, StopSignals, end, supervise

_ADDRESS = "127.0.0.1"

Entry = Callable[[RankEnvironment], int]


def run_local(
    world_size: int,
    entry: Entry,
    *,
    preload: Callable[[], None],
    warm: bool | Callable[[], bool],
    command: Sequence[str] | None = None,
    heard: Callable[[str], None] = lambda said: None,
) -> int:
    """Start ``world_size`` ranks on this machine and stay until all have ended. Main thread only.

    A rank that raises, exits or is killed ends the run within 10 s; standard error then names the first with its
    traceback. SIGTERM, SIGUSR1 and Ctrl-C reach the ranks once, as SIGTERM; a second Ctrl-C kills them. If this process
    is killed the ranks die with it.

    Args:
        world_size: number of ranks.
        entry: a rank's whole work; returns its exit code. Runs in the forked ranks, so it may be any callable.
        preload: imports what every rank needs. Called once before the ranks are forked: must start no thread and run no
            tensor op. Not called where ``warm`` is false.
        warm: fork the ranks from this process, for CPU ranks, or a function that says so: it may import torch, which
            reads the number of threads that is set before. False starts ``command`` once per rank, because a CUDA
            context does not survive a fork; that program calls ``from_environment`` and ``run_rank``.
        command: program and arguments of a fresh rank; default the same ``mslm`` command as this process.
        heard: is told what standard error is told of the end.

    Returns:
        0 all ranks returned 0; 75 all stopped after a clean save; 2 a rank raised a UserError (its message is said
        once); the ranks' own code where they return another; 1 anything else.

    Raises:
        LaunchError: a process could not be started, or ``world_size`` is below 1. Also whatever ``preload`` raises.
    """
    if world_size < 1:
        raise LaunchError(f"{world_size} ranks cannot be started: world_size must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(world_size)))
    # Ranks of one machine meet over loopback, whatever the host name resolves to (Wi-Fi, VPN, nothing).
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    forks = warm() if callable(warm) else warm
    ranks: list[RankProcess] = []
    with StopSignals() as stop, reserve_port(_ADDRESS) as reserved, adopt_and_end_orphans():
        try:
            if forks:
                preload()
            if stop.received is not None:
                return EXIT_STOPPED
            for slot in range(world_size):
                environment = _environment(slot, world_size, reserved.getsockname()[1])
                work = _forked(environment, entry) if forks else _fresh(environment, command or _same_command())
                ranks.append(_start(environment.rank, world_size, work))
            code, said = supervise(ranks, stop)
            heard(said)
            return code
        except KeyboardInterrupt:
            print("mslm: killed by a second Ctrl-C; the steps since the last checkpoint are lost", file=sys.stderr)
            return 1
        finally:
            end(ranks, grace_s=0)
            for process in ranks:
                os.close(process.pipe)


def threads_per_rank(world_size: int) -> int:
    """Compute threads of one rank: this process's cores shared out, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // world_size)


def cores_of(slot: int, slots: int, threads: int, cores: Sequence[int]) -> list[int]:
    """The cores that are a slot's own; all of them where there are fewer than ``threads`` for each slot."""
    share = len(cores) // slots
    return list(cores) if share < threads else sorted(cores)[slot * share : (slot + 1) * share]


def _environment(slot: int, world_size: int, port: int) -> RankEnvironment:
    launched = RankEnvironment(
        rank=slot,
        world_size=world_size,
        local_rank=slot,
        local_world_size=world_size,
        master_addr=_ADDRESS,
        master_port=port,
        launcher="local",
    )
    return rotated(launched, rotation(os.environ) or 0)


def _same_command() -> list[str]:
    return [sys.executable, "-m", "megatron_slm.cli", *sys.argv[1:]]


def _forked(environment: RankEnvironment, entry: Entry) -> Callable[[int], NoReturn]:
    def work(report_fd: int) -> NoReturn:
        os.environ.update(environment.to_environ())
        if rotation(os.environ) is not None:
            # A place is a place only if no other process comes there.
            threads = int(os.environ["OMP_NUM_THREADS"].partition(",")[0])
            cores = list(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores_of(environment.slot, environment.world_size, threads, cores))
        if environment.world_size > 1:
            # Several ranks reading one terminal would each get a part of what is typed.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run_and_report(environment, entry, report_fd)

    return work


def _fresh(environment: RankEnvironment, command: Sequence[str]) -> Callable[[int], NoReturn]:
    def work(report_fd: int) -> NoReturn:
        os.set_inheritable(report_fd, True)
        variables = {**os.environ, **environment.to_environ(), REPORT_VARIABLE: str(report_fd)}
        os.execvpe(command[0], list(command), variables)

    return work


def _start(rank: int, world_size: int, work: Callable[[int], NoReturn]) -> RankProcess:
    """Fork one process that does ``work`` and nothing of ours."""
    parent_pid = os.getpid()
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    sys.stdout.flush()
    sys.stderr.flush()
    # A stop signal between the fork and the rank's own settings must wait, not run the parent's handler in the rank.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pid = os.fork()
    except OSError as error:
        os.close(read_end)
        os.close(write_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise LaunchError(
            f"rank {rank} of {world_size} cannot be started: {error.strerror}; start fewer ranks"
        ) from error
    if pid == 0:
        _become_rank(parent_pid, mask, work, write_end)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(write_end)
    return RankProcess(rank, pid, read_end)


def _become_rank(
    parent_pid: int, mask: set[signal.Signals | int], work: Callable[[int], NoReturn], fd: int
) -> NoReturn:
    try:
        die_with_parent(parent_pid)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The terminal and Slurm signal every process of the job; the parent answers for all with one SIGTERM each.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work(fd)
    except BaseException:  # whatever ends a rank is reported
        traceback.print_exc()
    finally:
        os._exit(1)  # whatever happens, a rank never runs on into its parent's code
