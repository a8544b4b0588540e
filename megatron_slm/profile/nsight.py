"""Reads an SQLite export of Nsight Systems (``nsys export --type sqlite``), one rank a file. No torch.

The tables and columns are those of NVIDIA's "Nsight Systems export documentation", SQLite schema reference; tables are
made only where there is something to put into them. A kernel belongs to the ranges that its launch lies in: both carry
one ``correlationId``, which is counted anew in every process.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from megatron_slm.errors import DataError
from megatron_slm.profile import names
from megatron_slm.profile.exchanges import Asked, is_exchange_kernel, kernel_operation, matched
from megatron_slm.profile.trace import Exchange, Range, RankTrace, Work

MAGIC = b"SQLite format 3\x00"
_KERNELS, _LAUNCHES = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
_COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "memset"}
_NVTX, _STRINGS, _ENVIRONMENT = "NVTX_EVENTS", "StringIds", "TARGET_INFO_SYSTEM_ENV"
_COPY_KINDS = {1: "host to device", 2: "device to host", 8: "device to device", 10: "device to device, peer"}
"""``CUpti_ActivityMemcpyKind``."""
_PROCESS = 0x1000000
"""A global thread id is a global process id with the thread in its last 24 bits."""


def is_sqlite(path: Path) -> bool:
    """Whether a file is a database."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_nsight(path: Path) -> RankTrace:
    """One rank's export.

    Raises:
        DataError: it is no export of Nsight Systems.
    """
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        try:
            return _read(database, path)
        except sqlite3.Error as error:
            raise DataError(
                f"{path} cannot be read as an export of Nsight Systems ({error}). Make it again: nsys export --type "
                "sqlite rank-N.nsys-rep."
            ) from error


def _read(database: sqlite3.Connection, path: Path) -> RankTrace:
    tables = {str(name) for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables & {_KERNELS, _NVTX}:
        raise DataError(
            f"{path} holds neither {_KERNELS} nor {_NVTX}, so it is no export of Nsight Systems, or nothing was "
            "captured: were the profiled steps reached?"
        )
    strings: dict[int, str] = {}
    if _STRINGS in tables:
        strings = dict(database.execute(f"SELECT id, value FROM {_STRINGS}"))
    found = RankTrace(0, str(path), on_gpu=_KERNELS in tables)
    if _NVTX in tables:
        found.ranges = list(_ranges(database, strings))
    if _ENVIRONMENT in tables:
        host = database.execute(f"SELECT value FROM {_ENVIRONMENT} WHERE name = 'Hostname'").fetchone()
        found.host = str(host[0]) if host else ""
    found.rank = _rank(path, found)
    asked = [Asked(*one[:2], names.exchanged_of(one.name)) for one in found.ranges if one.kind == names.COLLECTIVE]
    exchanges = []
    for start, end, issued, name, lane in _device_work(database, tables, strings):
        if is_exchange_kernel(name):
            exchanges.append(Exchange(start, end, issued, kernel_operation(name), "", 0))
        else:
            found.work.append(Work(start, end, issued, name, end - start, True, lane))
    found.exchanges = matched(exchanges, asked)
    if not any(one.kind == names.STEP for one in found.ranges):
        found.notes.append("no range of a step: was the run profiled with profile.profile_tools=nsys-capture?")
    return found


def _ranges(database: sqlite3.Connection, strings: dict[int, str]) -> Iterator[Range]:
    """Our ranges; an end is missing where the capture ended inside."""
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({_NVTX})")}
    text_id = "textId" if "textId" in columns else "NULL"
    query = f'SELECT start, "end", text, {text_id} FROM {_NVTX} WHERE "end" IS NOT NULL ORDER BY start'
    for start, end, text, number in database.execute(query):
        label = names.label_of(text if text is not None else strings.get(number, ""))
        if label is not None:
            yield Range(start, end, *label)


def _rank(path: Path, found: RankTrace) -> int:
    for one in found.ranges:
        if one.kind == names.RANK:
            return names.rank_of(one.name)
    number = re.search(r"rank[-_]?(\d+)", path.name)
    return int(number[1]) if number else 0


def _device_work(
    database: sqlite3.Connection, tables: set[str], strings: dict[int, str]
) -> Iterator[tuple[int, int, int, str, str]]:
    """(start, end, when the host asked, name, lane) of kernels, copies and fills."""
    launched: dict[tuple[int, int], int] = {}
    if _LAUNCHES in tables:
        for start, thread, correlation in database.execute(f"SELECT start, globalTid, correlationId FROM {_LAUNCHES}"):
            launched[thread // _PROCESS, correlation] = start
    processes = {process for process, _ in launched}
    alone = next(iter(processes)) if len(processes) == 1 else None

    def issued(start: int, process: int | None, correlation: int) -> int:
        number = process // _PROCESS if process is not None else alone
        return launched.get((number if number is not None else -1, correlation), start)

    if _KERNELS in tables:
        process = _process_column(database, _KERNELS)
        query = f'SELECT start, "end", streamId, correlationId, {process}, shortName FROM {_KERNELS}'
        for start, end, stream, correlation, owner, name in database.execute(query):
            text = strings.get(name, str(name))
            yield start, end, issued(start, owner, correlation), text, f"stream {stream}"
    for table, word in _COPIES.items():
        if table not in tables:
            continue
        process = _process_column(database, table)
        kind = "copyKind" if word == "memcpy" else "NULL"
        query = f'SELECT start, "end", streamId, correlationId, {process}, {kind} FROM {table}'
        for start, end, stream, correlation, owner, number in database.execute(query):
            text = f"{word} {_COPY_KINDS.get(number, '')}".strip()
            yield start, end, issued(start, owner, correlation), text, f"stream {stream}"


def _process_column(database: sqlite3.Connection, table: str) -> str:
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
    return "globalPid" if "globalPid" in columns else "NULL"
