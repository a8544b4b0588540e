"""Runs a function on several gloo ranks from a test: ``run_ranks(work, 4, argument)``.

The ranks are forked by the launcher's own ``run_local``, from a parent process that has imported torch and core once
for the whole session and does nothing else. So what a test has done to its own process (threads, process groups,
changed modules) never reaches the ranks, and starting them takes a fraction of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.kinship import die_with_parent
from megatron_slm.launch.local import run_local

_SERVE = "import sys; sys.path[:] = {path!r}; from tests.ranks import serve; serve({fd}, {parent})"


class RankFailure(AssertionError):
    """A rank failed; the message is the launcher's report, with the rank's traceback. ``code`` is the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Job:
    """One call of ``run_ranks``: the function by name, its pickled arguments, and the caller's surroundings."""

    module: str
    file: str | None
    qualname: str
    arguments: bytes
    world_size: int
    timeout_s: float
    directory: Path
    working_directory: Path
    environ: dict[str, str]


def run_ranks(work: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``work(*arguments)`` on every rank, inside an initialised gloo world; returns the results by rank.

    ``work`` is a function at the top of a module (each rank imports that module); ``torch.distributed.get_rank()`` in
    it says which rank it is. Arguments and results are pickled; tensors are fine. The ranks have the test's environment
    variables and working directory, and core with the CPU device seam applied. What they print comes out with the test.

    Args:
        timeout_s: a rank that takes longer prints where it hangs, and the call fails.

    Raises:
        RankFailure: a rank raised, exited, was killed or hung; the message names it.
    """
    if "<" in work.__qualname__:
        raise TypeError(
            f"{work.__qualname__} cannot be found by name in another process: move it to the top of its module"
        )
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        job = Job(
            module=work.__module__,
            file=getattr(sys.modules[work.__module__], "__file__", None),
            qualname=work.__qualname__,
            arguments=pickle.dumps(arguments),
            world_size=world_size,
            timeout_s=timeout_s,
            directory=Path(name),
            working_directory=Path.cwd(),
            environ=dict(os.environ),
        )
        code = warm_parent().run(job)
        sys.stdout.write(job.directory.joinpath("stdout").read_text(errors="replace"))
        said = job.directory.joinpath("stderr").read_text(errors="replace")
        if code != 0:
            raise RankFailure(code, f"exit code {code}\n{said}")
        sys.stderr.write(said)
        return [pickle.loads(_result_file(job, rank).read_bytes()) for rank in range(world_size)]


class WarmParent:
    """The process that forks the ranks, and the connection to it. Ends with this process, at the latest."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process writes into it
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(path=sys.path, fd=fd, parent=os.getpid())],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,  # Ctrl-C is for pytest; the ranks end with it
        )
        theirs.close()
        atexit.register(self.close)

    def run(self, job: Job) -> int:
        """Have the ranks of ``job`` run; returns the launcher's exit code."""
        try:
            self._connection.send(job)
            # The ranks end themselves at their time limit; this is for a launcher that hangs.
            if self._connection.poll(job.timeout_s + 60.0):
                return int(self._connection.recv())
            raise RankFailure(
                1, f"the ranks of {job.qualname} did not end {job.timeout_s + 60:.0f} s after their start"
            )
        except (EOFError, OSError) as error:
            self._output.seek(0)
            said = self._output.read().decode(errors="replace")
            raise RankFailure(1, f"the warm parent of the ranks is gone:\n{said}") from error

    def close(self) -> None:
        """End the process and whatever it runs; ranks die with their parent."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


@functools.cache
def warm_parent() -> WarmParent:
    """The one warm parent of this process, started at the first call. Returns while it is still importing."""
    return WarmParent()


def serve(fd: int, parent_pid: int) -> None:
    """The warm parent's whole life: import, then fork one launcher a job until the tests have gone."""
    die_with_parent(parent_pid)
    connection: Connection[Any, Any] = Connection(fd)
    for name in ("pytest", "torch._dynamo"):  # test modules and torch's optimizers import them; each rank would pay
        importlib.import_module(name)
    from megatron_slm.parallel import device

    device.preload()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _launch(job, parent)
        _, status = os.waitpid(pid, 0)
        connection.send(os.waitstatus_to_exitcode(status))


def _launch(job: Job, parent_pid: int) -> NoReturn:
    """Be ``mslm`` for one job: the parent of its ranks."""
    code = 1
    try:
        die_with_parent(parent_pid)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(job.working_directory)
        os.environ.clear()
        os.environ.update(job.environ)
        code = run_local(job.world_size, functools.partial(_be_rank, job), preload=lambda: None, warm=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_rank(job: Job, environment: RankEnvironment) -> int:
    import torch
    import torch.distributed

    faulthandler.dump_traceback_later(job.timeout_s, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=job.timeout_s))
    result = function_named(job.module, job.file, job.qualname)(*pickle.loads(job.arguments))
    _result_file(job, environment.rank).write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 holds the store: nobody leaves while another still needs it
        torch.distributed.destroy_process_group()
    return 0


def function_named(module: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """The function of a test's module, in another process than the test's."""
    found: Any = _module(module, file)
    for name in qualname.split("."):
        found = getattr(found, name)
    function: Callable[..., Any] = found
    return function


def _module(name: str, file: str | None) -> ModuleType:
    """The test's module under the name pytest gave it, which need not be importable."""
    spec = None
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
    if file is None or (spec is not None and spec.origin == file):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} must be a Python source file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _result_file(job: Job, rank: int) -> Path:
    return job.directory / f"rank{rank}.pickle"
