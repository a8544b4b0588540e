"""The directory of runs: room, latency, atomic renames, locks; and whether all nodes see the same one. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_slm.doctor.result import Result

SUBJECT = "storage"
GIB = 1 << 30
KEPT = 2
"""Checkpoints that lie there at a time: the last one stays until the next is proven."""
FILES = 10_000
"""Files that a run may leave: shards of checkpoints, logs, records."""
LATENCY_S = 0.5
"""Of a small file written for good, beyond which a log line or a tracker would hold up a step."""
REPEATS = 5
RENAMES = 100
THROUGHPUT_BYTES = 16 << 20
NONCE_PATIENCE_S = 3.0
"""A network file system may show another node's new file only after its attribute cache has aged (NFS: 3 s)."""

_LOCKS = "Mount it with locks (Lustre: -o flock; NFS: without nolock), or name another place with log.runs_dir=."


def nearest(directory: Path) -> Path:
    """The directory, or the first one above it that exists."""
    found = directory.absolute()
    while not found.is_dir() and found != found.parent:
        found = found.parent
    return found


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory of our own beside the runs, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".mslm-doctor-", dir=nearest(directory)) as name:
        yield Path(name)


def room(directory: Path, checkpoint_bytes: int | None) -> Iterator[Result]:
    """Free space and files, and what kind of file system it is.

    Args:
        checkpoint_bytes: of one checkpoint of the job; None where no configuration says.
    """
    place = nearest(directory)
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    value = f"{free / GIB:.1f} GiB free in {place} ({_kind(place)})"
    needed = KEPT * (checkpoint_bytes or 0)
    expected = f"{KEPT} checkpoints of {needed / KEPT / GIB:.2f} GiB" if needed else ""
    if free < needed:
        remedy = "Make room, or name another place with log.runs_dir=: a save needs the old checkpoint beside the new."
        yield Result(SUBJECT, "space", "fail", value, expected, remedy)
    else:
        yield Result(SUBJECT, "space", "ok", value, expected)
    if found.f_files:
        value = f"{found.f_favail} of {found.f_files} files left"
        if found.f_favail < FILES:
            remedy = "Remove files there, or name another place with log.runs_dir=."
            yield Result(SUBJECT, "inodes", "fail", value, f"{FILES}", remedy)
        else:
            yield Result(SUBJECT, "inodes", "ok", value, f"{FILES}")


def latency(directory: Path) -> Iterator[Result]:
    """Seconds of a small file written, forced to the disk and renamed, as trackers and records are."""
    with scratch(directory) as place:
        seconds = []
        for number in range(REPEATS):
            start = time.perf_counter()
            _write_for_good(place / "target", f"{number}\n".encode())
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    value = f"{1e3 * median:.1f} ms (longest {1e3 * max(seconds):.1f}) to write, force and rename a small file"
    if median > LATENCY_S:
        remedy = "Name a faster place with log.runs_dir=, or write fewer checkpoints and records."
        yield Result(SUBJECT, "latency", "warn", value, f"{1e3 * LATENCY_S:.0f} ms", remedy)
    else:
        yield Result(SUBJECT, "latency", "ok", value, f"{1e3 * LATENCY_S:.0f} ms")


def throughput(directory: Path, checkpoint_bytes: int | None) -> Iterator[Result]:
    """Bytes a second of one writer, and what that makes of a checkpoint written by it alone."""
    block = os.urandom(1 << 20)
    with scratch(directory) as place, (place / "block").open("wb") as stream:
        start = time.perf_counter()
        for _ in range(THROUGHPUT_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        rate = THROUGHPUT_BYTES / (time.perf_counter() - start)
    of_it = "" if checkpoint_bytes is None else f"; a checkpoint takes one such writer {checkpoint_bytes / rate:.0f} s"
    yield Result(SUBJECT, "throughput", "ok", f"{rate / 1e6:.0f} MB/s of one writer{of_it}")


def rename(directory: Path) -> Iterator[Result]:
    """Replacing a file is atomic: a reader meanwhile always finds the old one or the new one, whole."""
    with scratch(directory) as place:
        target, wrong, done = place / "target", list[str](), threading.Event()
        target.write_bytes(b"0" * 512)

        def read() -> None:
            while not done.is_set() and not wrong:
                try:
                    size = len(target.read_bytes())
                except OSError as error:
                    wrong.append(f"the file was not there ({error.strerror})")
                else:
                    if size != 512:
                        wrong.append(f"{size} of 512 bytes were there")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        for number in range(RENAMES):
            (place / "next").write_bytes(str(number % 10).encode() * 512)
            os.replace(place / "next", target)
        done.set()
        reader.join()
    if wrong:
        remedy = "Name a POSIX file system with log.runs_dir=: a tracker could be lost on this one."
        yield Result(SUBJECT, "atomic rename", "fail", wrong[0], "old or new, whole", remedy)
    else:
        yield Result(SUBJECT, "atomic rename", "ok", f"{RENAMES} renames under a reader")


def lock(directory: Path) -> Iterator[Result]:
    """A lock that is held is refused to another, which keeps two jobs from writing one run."""
    with scratch(directory) as place, (place / "lock").open("a") as first, (place / "lock").open("a") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Result(SUBJECT, "locks", "fail", f"flock: {error.strerror}", "flock works", _LOCKS)
            return
        if held(second.fileno()):
            yield Result(SUBJECT, "locks", "ok", "a held lock is refused to another process's file")
        else:
            yield Result(SUBJECT, "locks", "fail", "two have the same lock", "one of them", _LOCKS)


def held(descriptor: int) -> bool:
    """Whether another open file holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def writable(directory: Path) -> Iterator[Result]:
    """Something can be written there."""
    place = nearest(directory)
    try:
        with scratch(directory):
            value = str(place) if place == directory.absolute() else f"{directory}, to be made in {place}"
            yield Result(SUBJECT, "runs_dir", "ok", value)
    except OSError as error:
        remedy = "Make it writable, or name another place with log.runs_dir=."
        yield Result(SUBJECT, "runs_dir", "fail", f"{place}: {error.strerror}", "writable", remedy)


def seen(path: Path, content: str, patience_s: float = NONCE_PATIENCE_S) -> tuple[str, bool]:
    """What another node sees of a file that rank 0 has written and locked.

    Returns:
        Empty, or what is wrong; and whether the lock is refused here too.
    """
    give_up = time.monotonic() + patience_s
    while True:
        try:
            found = path.read_text(encoding="utf-8")
            if found == content:
                break
            problem = "there is another file of this name"
        except OSError as error:
            problem = str(error.strerror)
        if time.monotonic() > give_up:
            return problem, False
        time.sleep(0.05)
    with path.open("a") as stream:
        return "", held(stream.fileno())


def shared(path: Path, answers: Mapping[str, tuple[str, bool]], writer: str) -> Iterator[Result]:
    """Whether every node sees what rank 0 has written.

    Args:
        answers: host -> what :func:`seen` has returned there.
        writer: rank 0's host.
    """
    blind = {host: problem for host, (problem, _) in answers.items() if problem}
    unlocked = [host for host, (problem, refused) in answers.items() if not problem and not refused]
    remedy = "Name a directory of a file system that all nodes mount, with log.runs_dir=."
    for host, problem in blind.items():
        value = f"{host} does not see what {writer} has written to {path.parent} ({problem})"
        yield Result(SUBJECT, "shared", "fail", value, "one directory for all nodes", remedy, host)
    if unlocked:
        value = f"a lock of {writer} is not seen by {', '.join(unlocked)}"
        yield Result(SUBJECT, "shared locks", "warn", value, "refused everywhere", _LOCKS)
    if not blind and not unlocked:
        value = f"{len(answers)} node(s) see the file and the lock of {writer}"
        yield Result(SUBJECT, "shared", "ok", value)


def _write_for_good(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _kind(place: Path) -> str:
    """Type of the file system that holds it."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, mount, name, *_ = line.split(" ")
        if place.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, name
    return kind
