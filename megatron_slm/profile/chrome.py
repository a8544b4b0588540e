"""Reads a Chrome trace of torch's profiler: of CUDA its kernels, of a CPU rank its operators. No torch."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.errors import DataError
from megatron_slm.profile import names
from megatron_slm.profile.exchanges import Asked, is_exchange_kernel, kernel_operation, matched
from megatron_slm.profile.trace import Exchange, Range, RankTrace, Work

_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
_GLOO = "gloo:"
_NOT_WORK = ("c10d::", "autograd::", "profiler::", "nccl:", _GLOO)
"""Operators that call others, or wait for other ranks."""
_ITEM_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short": 2}
_ITEM_BYTES |= {"Float": 4, "Double": 8, "BFloat16": 2, "Half": 2, "Long": 8, "Int": 4}
Event = Mapping[str, Any]


def read_chrome(path: Path) -> RankTrace:
    """One rank's trace; ``.gz`` is unpacked.

    Raises:
        DataError: it is no Chrome trace.
    """
    try:
        packed = path.read_bytes()
        with _no_collection():
            document = json.loads(gzip.decompress(packed) if path.suffix == ".gz" else packed)
        events = document["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no Chrome trace of torch's profiler ({error}). Give rank-N.json.gz of a run's profile/, or an "
            "SQLite export of Nsight Systems."
        ) from error
    about = document.get("mslm", {})
    found = RankTrace(_rank(path, document), str(path), host=str(about.get("host", "")))
    by_category: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat", "")].append(event)
    found.ranges, asked = _ranges(by_category["user_annotation"])
    found.on_gpu = any(by_category[category] for category in _DEVICE_WORK)
    if found.on_gpu:
        _add_device(found, by_category, asked, about.get("axes", {}))
    else:
        _add_host(found, by_category, asked)
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collecting garbage looks at every event read so far, again and again: six times the time for 100 MB."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _rank(path: Path, document: Mapping[str, Any]) -> int:
    for where in (document.get("mslm", {}), document.get("distributedInfo", {})):
        if "rank" in where:
            return int(where["rank"])
    number = re.search(r"rank[-_]?(\d+)", path.name)
    return int(number[1]) if number else 0


def _span(event: Event) -> tuple[int, int]:
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)


def _ranges(annotations: Sequence[Event]) -> tuple[list[Range], list[Asked]]:
    """Our ranges, and the collectives among them; without any, the steps of torch's own schedule."""
    ranges = []
    for event in annotations:
        if (label := names.label_of(event["name"])) is not None:
            ranges.append(Range(*_span(event), *label))
    if not any(one.kind == names.STEP for one in ranges):
        for event in annotations:
            if event["name"].startswith("ProfilerStep#"):
                ranges.append(Range(*_span(event), names.STEP, event["name"].partition("#")[2]))
    asked = [Asked(*one[:2], names.exchanged_of(one.name)) for one in ranges if one.kind == names.COLLECTIVE]
    return ranges, asked


def _add_device(
    found: RankTrace, events: Mapping[str, Sequence[Event]], asked: Sequence[Asked], axes: Mapping[str, str]
) -> None:
    launched = {
        event["args"]["correlation"]: round(event["ts"] * 1000)
        for category in _LAUNCHES
        for event in events.get(category, ())
        if "correlation" in event.get("args", {})
    }
    exchanges = []
    for event in (event for category in _DEVICE_WORK for event in events.get(category, ())):
        start, end = _span(event)
        arguments = event.get("args", {})
        issued = launched.get(arguments.get("correlation"), start)
        if not is_exchange_kernel(event["name"]):
            lane = f"stream {arguments.get('stream', event.get('tid'))}"
            found.work.append(Work(start, end, issued, event["name"], end - start, True, lane))
            continue
        operation = _plain(str(arguments.get("Collective name", "")) or kernel_operation(event["name"]))
        axis = names.axis_of(operation, axes.get(str(arguments.get("Process Group Name", "")), ""))
        size = int(arguments.get("In msg nelems", 0)) * _ITEM_BYTES.get(str(arguments.get("dtype", "")), 0)
        exchanges.append(Exchange(start, end, issued, operation, axis, size))
    found.exchanges = matched(exchanges, asked)


def _plain(operation: str) -> str:
    """``_allgather_base`` and ``allgather`` as torch.distributed calls them."""
    if "/" in operation:
        return operation
    bare = operation.strip("_").removesuffix("_base").replace("_", "").lower()
    known = {"allgather": "all_gather", "allreduce": "all_reduce", "reducescatter": "reduce_scatter"}
    return known.get(bare, "all_to_all" if bare.startswith(("alltoall", "all2all")) else bare)


def _add_host(found: RankTrace, events: Mapping[str, Sequence[Event]], asked: Sequence[Asked]) -> None:
    exchanges, gloo_lanes, training = [], set(), set()
    for event in events.get("user_annotation", ()):
        if event["name"].startswith(_GLOO):
            start, end = _span(event)
            operation = event["name"].removeprefix(_GLOO)
            exchanges.append(Exchange(start, end, start, operation, "", _input_bytes(event.get("args", {}))))
            gloo_lanes.add(event["tid"])
        elif event["name"].startswith("step: "):
            training.add(event["tid"])
    found.exchanges = matched(exchanges, asked)
    lanes: dict[Any, list[Event]] = defaultdict(list)
    for event in events.get("cpu_op", ()):
        # What gloo's threads copy is part of the exchange.
        if event["tid"] in training or event["tid"] not in gloo_lanes:
            lanes[event["tid"]].append(event)
    for lane, ops in lanes.items():
        found.work += _work(f"thread {lane}", ops)


def _input_bytes(arguments: Mapping[str, Any]) -> int:
    size = 0
    for shape, kind in zip(arguments.get("Input Dims", ()), arguments.get("Input type", ()), strict=False):
        count = 1
        for length in shape:
            count *= length if isinstance(length, int) else 0
        size += count * _ITEM_BYTES.get(kind, 1)
    return size


def _work(lane: str, ops: Iterable[Event]) -> list[Work]:
    """Operators of one thread with what each did itself."""
    spans = [
        (*_span(event), event["name"])
        for event in ops
        if "::" in event["name"] and not event["name"].startswith(_NOT_WORK)
    ]
    spans.sort(key=lambda span: (span[0], -span[1]))
    found: list[Work] = []
    stack: list[int] = []
    inner = [0] * len(spans)
    outermost = [False] * len(spans)
    for index, (start, end, _) in enumerate(spans):
        while stack and spans[stack[-1]][1] <= start:
            stack.pop()
        if stack:
            inner[stack[-1]] += end - start
        else:
            outermost[index] = True
        stack.append(index)
    for index, (start, end, name) in enumerate(spans):
        found.append(Work(start, end, start, name, end - start - inner[index], outermost[index], lane))
    return found
