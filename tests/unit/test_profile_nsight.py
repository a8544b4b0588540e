"""Nsight Systems without Nsight Systems: its SQLite export written by hand, and its program by a stub.

The tables are written with the columns of NVIDIA's "Nsight Systems export documentation"; no file of a real nsys was at
hand. The stub on PATH writes down how it was called.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from megatron_slm.errors import DataError
from megatron_slm.profile.analyse import Spent, analysed
from megatron_slm.profile.compare import report_of, traces_of
from megatron_slm.profile.nsight import is_sqlite, read_nsight

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "nsight.sh"
PUSH_POP, START_END = 59, 60
PID = 0x0100002A << 24
"""A global process id: its last 24 bits are a thread's."""

SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INT NOT NULL, end INT, eventType INT NOT NULL, rangeId INT, category INT, color INT,
    text TEXT, globalTid INT, endGlobalTid INT, textId INT, domainId INT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT NOT NULL, end INT NOT NULL, eventClass INT, globalTid INT,
    correlationId INT, nameId INT, returnValue INT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT NOT NULL, end INT NOT NULL, deviceId INT, contextId INT,
    streamId INT, correlationId INT, globalPid INT, demangledName INT, shortName INT);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INT NOT NULL, end INT NOT NULL, deviceId INT, contextId INT,
    streamId INT, correlationId INT, globalPid INT, bytes INT, copyKind INT);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INT, devStateName TEXT, name TEXT, nameEnum INT, value TEXT);
"""


def exported(path: Path, rank: int) -> Path:
    """A step of 1000 ns: a product of 200, a copy of 50, and an exchange of 300 of which the product hides 100."""
    strings = ["step: 3", "ampere_sgemm", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "cudaLaunchKernel_v7000"]
    ranges = [
        (0, 1000, PUSH_POP, None, 0),
        (-5, -4, PUSH_POP, f"rank: {rank} of 4", None),
        (0, 300, PUSH_POP, "phase: forward and backward", None),
        (100, 200, PUSH_POP, "module: output_layer forward", None),
        (300, 1000, PUSH_POP, "phase: gradient norm", None),
        (205, 215, START_END, "collective: all_reduce tp-pp 64 bytes", None),
        (10, 20, PUSH_POP, "somebody else's", None),
        (950, None, PUSH_POP, "phase: cut off by the end of the capture", None),
    ]
    with sqlite3.connect(path) as database:
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(strings))
        database.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, NULL, NULL, NULL, ?, ?, NULL, ?, 0)",
            [(start, end, kind, text, PID + 7, number) for start, end, kind, text, number in ranges],
        )
        launches = [(110, 115, PID + 7, 1), (210, 212, PID + 8, 2), (310, 312, PID + 7, 3), (990, 991, 5 << 24, 1)]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 3, 0)", launches)
        kernels = [(400, 600, 7, 1, PID, 1, 1), (500, 800, 9, 2, PID, 2, 2)]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, ?, ?, ?, ?, ?)", kernels)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (850, 900, 0, 1, 7, 3, ?, 4096, 2)", (PID,))
        database.execute("INSERT INTO TARGET_INFO_SYSTEM_ENV VALUES (0, '', 'Hostname', 0, 'node17')")
    return path


def test_an_export_is_read_into_the_model_of_every_trace(tmp_path: Path) -> None:
    trace = read_nsight(exported(tmp_path / "some.sqlite", 3))
    assert (trace.rank, trace.host, trace.on_gpu) == (3, "node17", True)
    found = analysed(trace)
    assert found.steps_ns == {"3": 1000} and found.spent == Spent(1000, 250, 200)
    assert found.modules["output_layer forward"] == Spent(100, 200, 0), "launched there by this process, run later"
    assert found.phases["gradient norm"] == Spent(700, 50, 0)
    row = found.axes[0]
    assert (row.axis, row.size_bytes, row.time_ns, row.exposed_ns) == ("tp-pp", 64, 300, 200)
    assert [one.name for one in found.kernels] == ["ampere_sgemm", "memcpy device to host"]


def test_exports_of_a_folder_are_compared(tmp_path: Path) -> None:
    for rank in (0, 5):
        exported(tmp_path / f"rank-{rank}.sqlite", rank)
    report = report_of(traces_of([tmp_path]))
    assert [one.rank for one in report.ranks] == [0, 5] and report.slowest is not None


def test_an_export_without_kernels_or_ranges_of_ours_says_so(tmp_path: Path) -> None:
    path = exported(tmp_path / "rank-2.sqlite", 2)
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM NVTX_EVENTS")
    trace = read_nsight(path)
    assert trace.rank == 2 and "nsys-capture" in trace.notes[0], "the name of the file is all there is"
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE NVTX_EVENTS")
        database.execute("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
    with pytest.raises(DataError, match="nothing was captured"):
        read_nsight(path)


def test_a_damaged_export_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.sqlite"
    path.write_bytes(exported(tmp_path / "whole.sqlite", 0).read_bytes()[:5000])
    assert is_sqlite(path)
    with pytest.raises(DataError, match="Make it again: nsys export"):
        report_of([path])


def called(tmp_path: Path, *arguments: str, stub: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """``launch/nsight.sh``, with a stub named nsys on PATH that prints how it was called."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    if stub:
        (tools / "nsys").write_text('#!/bin/sh\nprintf "nsys %s\\n" "$*"\n')
        (tools / "nsys").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if "RANK" not in name and "SLURM" not in name}
    environment = {**clean, "PATH": f"{tools}:/usr/bin:/bin", **variables}
    command = [SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_chosen_rank_runs_under_nsys_whoever_started_it(tmp_path: Path, variable: str) -> None:
    ended = called(
        tmp_path, "--ranks", "0,5", "--out", str(tmp_path / "out"), "mslm", "profile", "-x", **{variable: "5"}
    )
    assert ended.returncode == 0 and (tmp_path / "out").is_dir()
    words = ended.stdout.split()
    assert words[:3] == ["nsys", "profile", f"--output={tmp_path}/out/rank-5"]
    assert words[-3:] == ["mslm", "profile", "-x"]
    for flag in (
        "--trace=cuda,nvtx,osrt,cudnn,cublas",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--cuda-memory-usage=true",
        "--export=sqlite",
    ):
        assert flag in words


def test_other_ranks_run_bare(tmp_path: Path) -> None:
    ended = called(tmp_path, "--ranks", "0,5", "echo", "bare", stub=False, SLURM_PROCID="1")
    assert (ended.returncode, ended.stdout) == (0, "bare\n")
    ended = called(tmp_path, "--ranks", "1", "echo", "bare", stub=False, SLURM_PROCID="1", RANK="0")
    assert ended.stdout == "bare\n", "torchrun inside a Slurm job"


def test_every_rank_can_be_chosen(tmp_path: Path) -> None:
    assert called(tmp_path, "--ranks", "all", "true", RANK="11").stdout.startswith(
        "nsys profile --output=nsight/rank-11"
    )


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    ended = called(tmp_path, "true", stub=False)
    assert ended.returncode == 2 and "developer.nvidia.com/nsight-systems" in ended.stderr
    assert called(tmp_path).returncode == 2 and "no command" in called(tmp_path).stderr
    assert "--rank is no option" in called(tmp_path, "--rank", "0", "true").stderr
    assert "--out takes a value" in called(tmp_path, "--out").stderr
