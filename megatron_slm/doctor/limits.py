"""What the system allows a process of this job: files, locked memory, shared memory, cores, memory. No torch."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from megatron_slm.doctor.result import Result

SUBJECT = "limits"
GIB = 1 << 30
OPEN_FILES = 4096
"""A rank holds a socket for each peer of each group, and the loader's files."""
PROCESSES = 4096
SHARED_MEMORY_BYTES = GIB
"""Of a node: batches between loader workers and a rank, and NCCL's buffers between its ranks (docker gives 64 MiB)."""
CGROUPS = Path("/sys/fs/cgroup")
GOVERNORS = Path("/sys/devices/system/cpu")


def ulimits(infiniband: bool) -> Iterator[Result]:
    """Of this process, as the ranks inherit them.

    Args:
        infiniband: whether the node has such devices, which register locked memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _least("open files", soft, OPEN_FILES, "n", hard)
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    yield _least("processes", soft, PROCESSES, "u", hard)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if infiniband and soft != resource.RLIM_INFINITY:
        remedy = "Set it before the ranks start: ulimit -l unlimited, or LimitMEMLOCK=infinity for slurmd."
        yield Result(SUBJECT, "locked memory", "fail", _bytes(soft), "unlimited, for InfiniBand", remedy)
    else:
        yield Result(SUBJECT, "locked memory", "ok", _bytes(soft), "unlimited where there is InfiniBand")
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    yield Result(SUBJECT, "core dumps", "ok", _bytes(soft), "0 keeps a crash of many ranks from filling the disk")


def shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Result]:
    """Room between the processes of a node."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        remedy = "Mount it: mount -t tmpfs tmpfs /dev/shm, or docker run --ipc=host."
        yield Result(SUBJECT, str(path), "fail", str(error.strerror), "shared memory", remedy)
        return
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    value, expected = f"{free / GIB:.1f} of {size / GIB:.1f} GiB free", f"{SHARED_MEMORY_BYTES / GIB:.0f} GiB free"
    if free < SHARED_MEMORY_BYTES:
        remedy = "Enlarge it (docker run --shm-size=16g or --ipc=host), or remove what lies there."
        yield Result(SUBJECT, str(path), "warn", value, expected, remedy)
    else:
        yield Result(SUBJECT, str(path), "ok", value, expected)


def cores(environ: Mapping[str, str], ranks_here: int) -> Iterator[Result]:
    """Cores of this process, their NUMA nodes and governor, and whether the ranks' threads fit on them.

    Args:
        ranks_here: ranks of this node.
    """
    own = sorted(os.sched_getaffinity(0))
    nodes = sorted({_numa(core) for core in own} - {None}, key=str)
    where = f" on NUMA node {', '.join(map(str, nodes))}" if nodes else ""
    yield Result("cores", "affinity", "ok", f"{len(own)} of {os.cpu_count()} cores{where}")
    yield from _threads(environ, ranks_here, len(own))
    governors = {_line(GOVERNORS / f"cpu{core}" / "cpufreq" / "scaling_governor") for core in own} - {None}
    if governors - {"performance"} and governors:
        remedy = "Set it: cpupower frequency-set -g performance; ranks wait for the slowest core."
        value = ", ".join(sorted(map(str, governors)))
        yield Result("cores", "governor", "warn", value, "performance", remedy)
    else:
        yield Result("cores", "governor", "ok" if governors else "absent", "performance" if governors else "none here")


def _threads(environ: Mapping[str, str], ranks_here: int, own: int) -> Iterator[Result]:
    text = environ.get("OMP_NUM_THREADS", "")
    threads = text.partition(",")[0]
    expected = f"set, and threads x {ranks_here} rank(s) at most {own} cores"
    if not threads:
        # One rank may have all; several would each start a thread on every core.
        if ranks_here > 1:
            remedy = f"Set OMP_NUM_THREADS={max(1, own // ranks_here)} before the ranks start."
            yield Result("cores", "OMP_NUM_THREADS", "warn", "not set", expected, remedy)
        else:
            yield Result("cores", "OMP_NUM_THREADS", "absent", "not set: the launcher shares out the cores")
    elif not threads.isdecimal() or int(threads) < 1:
        remedy = f"Set OMP_NUM_THREADS={max(1, own // max(1, ranks_here))}."
        yield Result("cores", "OMP_NUM_THREADS", "fail", text, "a whole number above 0", remedy)
    elif int(threads) * ranks_here > own:
        fewer = f"Set OMP_NUM_THREADS={own // ranks_here}, or start" if own >= ranks_here else "Start"
        remedy = f"{fewer} fewer ranks on this machine, or ask for more cores: ranks on one core wait for each other."
        yield Result("cores", "OMP_NUM_THREADS", "warn", f"{text} for each of {ranks_here} rank(s)", expected, remedy)
    else:
        yield Result("cores", "OMP_NUM_THREADS", "ok", f"{text} for each of {ranks_here} rank(s)", expected)


def control_group(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[Result]:
    """Memory and cores that the job's control group leaves it, by version 2 of control groups or version 1.

    Args:
        root: where they are mounted.
        own: the list of this process's groups.
    """
    groups = _groups(own)
    memory = _limit([root / groups.get("", "") / "memory.max", root / "memory.max"])
    memory = memory or _limit([root / "memory" / groups.get("memory", "") / "memory.limit_in_bytes"])
    total = psutil.virtual_memory().total
    if memory is not None and memory < total:
        yield Result(SUBJECT, "memory of the control group", "ok", f"{memory / GIB:.1f} of {total / GIB:.1f} GiB")
    else:
        yield Result(SUBJECT, "memory", "ok", f"{total / GIB:.1f} GiB, no limit of a control group")
    quota = _quota(root, groups)
    count = len(os.sched_getaffinity(0))
    if quota is not None and quota < count:
        remedy = f"Ask for {count} cores (--cpus-per-task), or use {max(1, int(quota))}: threads beyond are held up."
        yield Result(SUBJECT, "cores of the control group", "warn", f"{quota:g} of {count}", f"{count}", remedy)


def _quota(root: Path, groups: Mapping[str, str]) -> float | None:
    """Cores that the group may use at a time; None without a limit."""
    for path in (root / groups.get("", "") / "cpu.max", root / "cpu.max"):
        if (line := _line(path)) is not None:
            quota, _, period = line.partition(" ")
            return None if quota == "max" else int(quota) / int(period)
    quota_us = _line(root / "cpu" / groups.get("cpu", "") / "cpu.cfs_quota_us")
    period_us = _line(root / "cpu" / groups.get("cpu", "") / "cpu.cfs_period_us")
    return int(quota_us) / int(period_us) if quota_us and period_us and int(quota_us) > 0 else None


def _groups(own: Path) -> dict[str, str]:
    """Controller -> path below its mount; version 2 is the empty name."""
    found = {}
    for line in (_line(own) or "").splitlines():
        _, names, path = line.split(":", 2)
        found.update(dict.fromkeys(names.split(","), path.lstrip("/")))
    return found


def _limit(paths: list[Path]) -> int | None:
    for path in paths:
        if (line := _line(path)) is not None and line.isdecimal():
            return int(line)
    return None


def _numa(core: int) -> int | None:
    nodes = list((GOVERNORS / f"cpu{core}").glob("node[0-9]*"))
    return int(nodes[0].name.removeprefix("node")) if nodes else None


def _least(name: str, soft: int, least: int, letter: str, hard: int) -> Result:
    value = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < least:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        remedy = f"Raise it before the ranks start: ulimit -{letter} {least} (the hard limit is {most})."
        return Result(SUBJECT, name, "warn", value, f"at least {least}", remedy)
    return Result(SUBJECT, name, "ok", value, f"at least {least}")


def _bytes(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:g} MiB"


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
