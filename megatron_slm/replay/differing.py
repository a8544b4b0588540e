"""Every record in which two recordings differ, as JSON lines; and as traces of Megatron-LM. No torch.

A line holds, of one record: ``step``, ``start`` (of the state with which a process began behind the step, not of the
step itself), ``rank``, ``phase``, ``micro_batch`` (null where the phase has none), ``tensor``, ``dtype`` and ``shape``
(null where it is no tensor), ``occurrence`` among records of that name, ``index`` in the step, and the fingerprints
``first`` and ``second``, 32 hexadecimal digits each (null where a run has no such record).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.errors import CheckpointError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Differing, differing_records, pipeline_ranks
from megatron_slm.replay.report import BY_MICRO_BATCH, phase_name
from megatron_slm.replay.search import Streams
from megatron_slm.replay.stream import Flag, Frame, stream_path

Event = dict[str, Any]
MEGATRON_SCHEMA = 1
_TENSOR = re.compile(r"(?P<name>.*) (?P<dtype>\w+)\[(?P<shape>[\d,]*)\](?P<remark> \(.*\))?")


def write_differing(first: Capsule, second: Capsule, file: Path) -> int:
    """Write every record that differs, rank after rank in order of execution; returns how many.

    Raises:
        ConfigError: the layouts differ.
        CheckpointError: a recording is damaged, or ``file`` cannot be written.
    """
    count = 0
    try:
        with file.open("w", encoding="utf-8") as stream:
            for record in differing(first, second):
                stream.write(json.dumps(record) + "\n")
                count += 1
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error}); name another file.") from error
    return count


def differing(first: Capsule, second: Capsule) -> Iterator[dict[str, Any]]:
    """The same as values."""
    pipeline_ranks(first, second)  # refuses other layouts
    for rank in first.ranks:
        names = first.names(rank), second.names(rank)
        buckets = [capsule.manifest(1, rank)["buckets"] for capsule in (first, second)]
        streams = Streams((stream_path(first.folder, rank), stream_path(second.folder, rank)), names)
        for index in range(len(streams.pairs)):
            one, other = streams.frames(index)
            for found in differing_records(one, other, names, alike=buckets[0] == buckets[1]):
                yield _line(one, rank, found)


def megatron_traces(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Event | None, Event | None]]:
    """Lines as the records of two rank-local determinism traces of Megatron-LM (pull request 6610, schema version 1).

    Its tensor records certify a value by a sha256 of the bytes, which we do not have: a fingerprint is no such hash. So
    each line becomes a pair of its ``event`` records, whose ``fields`` hold dtype, shape and fingerprint and are
    compared as they are:

        iteration    step                       rank          rank
        microbatch   micro_batch                occurrence    occurrence
        phase        phase, "start ..." behind a start
        name         tensor                     sequence      order of execution, counted over a rank's lines

    Args:
        lines: of :func:`differing`, each rank's in their order.

    Returns:
        (of the first run, of the second run) for every line; None where the run has no such record. The records of a
        rank go into ``rank_XXXXXX.jsonl`` of a directory for each run.
    """
    counts: dict[int, int] = {}
    for line in lines:
        sequence = counts.get(line["rank"], 0)
        counts[line["rank"]] = sequence + 1
        sides = (_event(line, sequence, line[run]) if line[run] is not None else None for run in ("first", "second"))
        one, other = sides
        yield one, other


def _event(line: Mapping[str, Any], sequence: int, fingerprint: str) -> Event:
    return {
        "schema_version": MEGATRON_SCHEMA,
        "event": "event",
        "rank": line["rank"],
        "iteration": line["step"],
        "microbatch": line["micro_batch"],
        "phase": f"start {line['phase']}" if line["start"] else line["phase"],
        "name": line["tensor"],
        "occurrence": line["occurrence"],
        "sequence": sequence,
        "fields": {"dtype": line["dtype"], "shape": line["shape"], "fingerprint": fingerprint},
    }


def _line(frame: Frame, rank: int, found: Differing) -> dict[str, Any]:
    key = found.key
    parts = _TENSOR.fullmatch(key.name)
    shape = [int(size) for size in parts["shape"].split(",") if size] if parts else None
    return {
        "step": frame.step,
        "start": Flag.START in frame.flags,
        "rank": rank,
        "phase": phase_name(key.phase),
        "micro_batch": key.micro_batch if key.phase in BY_MICRO_BATCH else None,
        "tensor": parts["name"] + (parts["remark"] or "") if parts else key.name,
        "dtype": parts["dtype"] if parts else None,
        "shape": shape,
        "occurrence": key.nth,
        "index": found.place,
        "first": _hexadecimal(found.first),
        "second": _hexadecimal(found.second),
    }


def _hexadecimal(lanes: tuple[int, int] | None) -> str | None:
    return None if lanes is None else f"{lanes[0]:016x}{lanes[1]:016x}"
