"""The process of a sandbox, run by path with the standard library alone: the program it is given, under limits.

Always: own session and directory, empty environment and input, limits (setrlimit) on processor time, address space,
size of files, open files and processes; at the time limit, or when whoever asked for it goes, everything that was
started is killed, also what has left the process group. Run by root, the program is the user "nobody" (root has no
limit on processes), who may read what root may where Python's own library is not for all to read. Where the kernel
allows namespaces: no network, and no other process to be reached. Where it has Landlock (Linux 5.13): nothing is
written outside of its own directory.

It reads one JSON object from its input and writes one: ``proof``, as given, where program and tests have run to their
end, else null with the ``cause``. Where it cannot hold what is said above under "always" it fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
NEW_USER, NEW_NETWORK, NEW_PROCESSES, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITES = sum(1 << right for right in (1, *range(4, 13)))
"""Landlock's rights to write files, and to make and remove entries of directories (its first version)."""
CAPABILITY_VERSION, DAC_READ_SEARCH = 0x20080522, 1 << 2
NOBODY = 65534
CAUSE_BYTES = 300


def main(parent: int) -> None:
    """Run the job; say what came of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGTERM, _stop)
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)  # it was gone before the request was made
    job = json.load(sys.stdin)
    uid, shared, busy = os.getuid(), NEW_NETWORK | NEW_PROCESSES | NEW_IPC, 0
    if uid == 0:
        os.chown(".", NOBODY, NOBODY)
        libc.unshare(shared)
        busy = _tasks_of(NOBODY)
    elif libc.unshare(NEW_USER | shared) != 0:
        busy = _tasks_of(uid)  # a new namespace counts its own alone
    job["processes"] += busy
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        _first_process(job, writes, libc)
    os.close(writes)
    try:
        ended = _wait(child, time.monotonic() + job["wall_s"])
    finally:
        _end_all()
    os.set_blocking(reads, False)
    try:
        said = os.read(reads, 2 * CAUSE_BYTES).decode(errors="replace")
    except BlockingIOError:
        said = ""
    if said.startswith("!"):
        raise SystemExit(said)
    proved = said == "+" + job["proof"]
    cause = "" if proved else said[1:] if said.startswith("-") else _ended(ended, job["wall_s"])
    print(json.dumps({"proof": job["proof"] if proved else None, "cause": cause}), flush=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _end_all()
    shutil.rmtree(os.getcwd(), ignore_errors=True)  # whoever made it may be gone
    os._exit(1)


def _readable_by_all(directory: Path) -> bool:
    """Whether the user "nobody" may read the standard library."""
    return all(one.stat().st_mode & 0o001 for one in (directory, *directory.parents))


def _tasks_of(uid: int) -> int:
    """Threads of a user, which count towards the limit on processes."""
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found += len(os.listdir(entry / "task"))
        except OSError:
            continue  # it has ended
    return found


def _wait(child: int, until: float) -> int | None:
    """The exit status of the child; None where it runs on."""
    pause = 0.001
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    return None


def _ended(code: int | None, wall_s: float) -> str:
    if code is None:
        return f"ran longer than {wall_s:g} s"
    return f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


def _end_all() -> None:
    """Kill everything below this process. Whatever loses its parent becomes a child of it."""
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        for pid in _below(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _below(root: int) -> list[int]:
    """All descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The name before the last bracket may hold anything.
                stat = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(stat[1]), []).append(int(entry))
    found, left = [], [root]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def _first_process(job: dict[str, Any], writes: int, libc: Any) -> NoReturn:
    """The first process of the namespace, with whose end all others end: it waits for the program alone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    program = os.fork()
    if program == 0:
        _run(job, writes, libc)
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _run(job: dict[str, Any], writes: int, libc: Any) -> NoReturn:
    said = b""
    try:
        _limit(job, libc)
        said = b"-"
        space: dict[str, Any] = {"__name__": "__main__"}
        for name in ("program", "tests"):
            exec(compile(job[name], name, "exec"), space)
        said = b"+" + job["proof"].encode()
    except BaseException as error:  # SystemExit too: who leaves before the end of the tests has not passed them
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        said = (said or b"!") + cause.encode(errors="replace")[:CAUSE_BYTES]
    finally:
        os.write(writes, said)
        os._exit(0)


def _limit(job: dict[str, Any], libc: Any) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    _write_here_alone(libc)
    if os.getuid() == 0:
        _become_nobody(libc)
    seconds = int(job["wall_s"]) + 1
    for name, value in {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(name, (value, value))


def _become_nobody(libc: Any) -> None:
    """Give up everything that root may do, but for reading what Python's library may need."""
    keeps = not _readable_by_all(Path(os.__file__).parent)
    libc.prctl(PR_SET_KEEPCAPS, ctypes.c_ulong(keeps), 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    kept = DAC_READ_SEARCH if keeps else 0
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION, 0))
    if libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", kept, kept, 0, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities of root cannot be given up")


def _write_here_alone(libc: Any) -> None:
    """Ask the kernel to refuse every write outside of the working directory, where it can (Landlock)."""
    rights = ctypes.create_string_buffer(struct.pack("Q", WRITES))
    ruleset = libc.syscall(CREATE_RULESET, rights, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return
    for place, allowed in ((".", WRITES), (os.devnull, 1 << 1)):
        beneath = os.open(place, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, beneath))
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
        os.close(beneath)
    libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
    libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


if __name__ == "__main__":
    main(int(sys.argv[1]))
