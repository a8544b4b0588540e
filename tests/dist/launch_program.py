"""A program with ranks, run by path from the launcher's tests: ``launch_program.py BEHAVIOUR DIRECTORY [--fresh]``.

Every rank writes its process id to ``DIRECTORY/rankN.pid`` and, before it dies, the time to ``DIRECTORY/death``.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_slm.errors import DataError
from megatron_slm.launch.environment import RankEnvironment, from_environment
from megatron_slm.launch.local import run_local
from megatron_slm.launch.rank import run_rank
from megatron_slm.launch.signals import StopRequest

WORLD_SIZE = 4
CULPRIT = 2
BEHAVIOUR, DIRECTORY = sys.argv[1], Path(sys.argv[2])


def preload() -> None:
    importlib.import_module("torch.distributed")


def join_world() -> None:
    import torch.distributed

    torch.distributed.init_process_group("gloo")


def leave_world() -> None:
    """Together, because rank 0 holds the store; and before the interpreter's exit, which gloo's threads can abort."""
    import torch.distributed

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def all_reduce(value: int) -> int:
    import torch.distributed

    tensor = torch.tensor([value])
    torch.distributed.all_reduce(tensor)
    return int(tensor.item())


def wait_in_collectives() -> None:
    while True:
        all_reduce(1)


def mark_death() -> None:
    (DIRECTORY / "death").write_text(str(time.monotonic()))


def save_and_stop(environment: RankEnvironment) -> int:
    """A training loop in small: agrees on the flag over the ranks after each step."""
    with StopRequest() as stop:
        (DIRECTORY / f"rank{environment.rank}.stepping").touch()
        while True:
            time.sleep(0.01)
            if all_reduce(int(stop.requested)):
                leave_world()
                (DIRECTORY / f"rank{environment.rank}.saved").touch()
                return 75


def fail_with_others_waiting(environment: RankEnvironment) -> int:
    """The culprit ends as BEHAVIOUR says; the others wait for it in an all-reduce."""
    import torch.distributed

    all_reduce(1)
    if environment.rank != CULPRIT:
        wait_in_collectives()
    mark_death()
    if BEHAVIOUR == "raise":
        raise ValueError("the loss is not a number")
    if BEHAVIOUR == "raise_after_teardown":
        # The others see the closed connection before this exception has left the rank.
        try:
            raise ValueError("the loss is not a number")
        finally:
            torch.distributed.destroy_process_group()
            time.sleep(1.0)
    if BEHAVIOUR == "exit3":
        os._exit(3)
    if BEHAVIOUR == "exit0":
        os._exit(0)
    if BEHAVIOUR == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "segfault":
        ctypes.string_at(0)
    raise AssertionError(f"unknown behaviour {BEHAVIOUR}")


def entry(environment: RankEnvironment) -> int:
    (DIRECTORY / f"rank{environment.rank}.pid").write_text(str(os.getpid()))
    if BEHAVIOUR == "refuse_all":
        raise DataError("the corpus corpus.jsonl does not exist; give data.train")
    if BEHAVIOUR == "refuse_one" and environment.rank == CULPRIT:
        raise DataError("the corpus corpus.jsonl does not exist; give data.train")
    if BEHAVIOUR == "codes":
        return int(os.environ["CODES"].split(",")[environment.rank])
    if BEHAVIOUR in ("deaf", "ignore", "refuse_one", "outside"):
        if BEHAVIOUR in ("deaf", "ignore"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (DIRECTORY / f"rank{environment.rank}.stepping").touch()
        if BEHAVIOUR == "ignore" and environment.rank == CULPRIT:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", str(DIRECTORY)])
            while len(list(DIRECTORY.glob("*.stepping"))) < WORLD_SIZE:
                time.sleep(0.01)
            mark_death()
            raise ValueError("the loss is not a number")
        time.sleep(1000)
    join_world()
    if BEHAVIOUR == "sum":
        # One write a line: print() makes two where a launcher unbuffers it, and the ranks' lines would mix.
        sys.stdout.write(f"rank {environment.rank} got {all_reduce(environment.rank)}\n")
        leave_world()
        return 0
    if BEHAVIOUR == "steps":
        return save_and_stop(environment)
    return fail_with_others_waiting(environment)


def main() -> int:
    environment = from_environment(os.environ)
    if environment is not None:
        return run_rank(environment, entry)
    command = [sys.executable, *sys.argv] if "--fresh" in sys.argv else None
    return run_local(WORLD_SIZE, entry, preload=preload, warm=command is None, command=command)


if __name__ == "__main__":
    sys.exit(main())
