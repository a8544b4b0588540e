"""Ledgers as text and JSON: a table of the pipeline stages, one of layers, stacked bars, the peak explained."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_slm.memory.capacity import GIB
from megatron_slm.memory.ledger import Ledger, Row
from megatron_slm.memory.replay import in_flight

COLUMNS = {
    "parameters": ("parameters",),
    "gradients": ("gradients",),
    "optimizer": ("master weights", "moments"),
    "other models": ("other models",),
    "activations": ("activations",),
    "logits, loss": ("logits and loss",),
    "weight copies": ("weight copies",),
    "temporary": ("recompute", "communication buffers", "workspace", "rollout"),
    "beside torch": ("allocator rounding", "fragmentation", "NCCL", "CUDA context"),
}
"""Column of a table -> kinds of rows."""
SELDOM = ("other models",)
"""Columns that are left out where all is 0."""

BAR_WIDTH = 64
BAR_LETTERS = "PGOMALCT."
"""One letter for each of ``COLUMNS`` in a bar."""


def table(found: Sequence[Ledger]) -> str:
    """One line for each run of pipeline stages that hold the same, in GiB at the worst moment."""
    shown = _shown(found)
    head = f"{'pipeline stage':<15}" + "".join(f"{name:>14}" for name in shown)
    lines = [head + f"{'total':>9}  {'low - high':>16}  verdict"]
    for label, one in _grouped(found):
        cells = "".join(f"{gib(size):>14}" for name, size in columns(one).items() if name in shown)
        band = f"{gib(one.low)} - {gib(one.high)}"
        lines.append(f"{label:<15}{cells}{gib(one.size):>9}  {band:>16}  {one.verdict}".rstrip())
    return "\n".join(lines)


def bars(found: Sequence[Ledger]) -> str:
    """A stacked bar for each run of alike pipeline stages, up to the capacity where it is known."""
    shown = _shown(found)
    capacity = next((one.surroundings.capacity_bytes for one in found if one.surroundings), None)
    full = max([one.high for one in found] + [capacity or 0]) or 1
    lines = [
        "  ".join(f"{letter} {name}" for letter, name in zip(BAR_LETTERS, COLUMNS, strict=True) if name in shown)
        + "  | capacity",
    ]
    for label, one in _grouped(found):
        bar = ""
        reached = 0
        for letter, size in zip(BAR_LETTERS, columns(one).values(), strict=True):
            reached += size
            bar += letter * (round(reached / full * BAR_WIDTH) - len(bar))
        bar = bar.ljust(BAR_WIDTH + 1)
        if capacity is not None:
            place = round(capacity / full * BAR_WIDTH)
            bar = f"{bar[:place]}|{bar[place + 1 :]}"
        lines.append(f"{label:<15}{bar.rstrip()}")
    return "\n".join(lines)


def layers(one: Ledger) -> str:
    """What each layer of a rank holds, in MiB."""
    names, shown = list(dict.fromkeys(row.layer for row in one.rows)), _shown([one])
    sizes: Counter[tuple[str, str]] = Counter()
    for row in one.rows:
        column = next((name for name, kinds in COLUMNS.items() if row.kind in kinds), "temporary")
        sizes[row.layer, column] += row.size
    lines = [f"{'rank ' + str(one.rank):<22}" + "".join(f"{name:>14}" for name in shown) + f"{'MiB':>10}"]
    for name in sorted(names, key=_layer_order):
        cells = [sizes[name, column] / 2**20 for column in shown]
        text = "".join(f"{cell:>14,.1f}" for cell in cells)
        lines.append(f"{name or '(no layer)':<22}{text}{sum(cells):>10,.1f}")
    return "\n".join(lines)


def why(one: Ledger) -> str:
    """The worst moment in words: when it is, what is in flight, and the largest things that are alive."""
    timeline = one.timeline
    worst = timeline.moments[timeline.worst]
    turn = worst.turn
    flying = in_flight(timeline)
    held = ", ".join(f"{count} of chunk {chunk}" for chunk, count in sorted(flying.items())) or "none"
    when = {
        "forward": f"in the forward pass of micro-batch {turn.micro_batch} through chunk {turn.chunk}",
        "backward": f"in the backward pass of micro-batch {turn.micro_batch} through chunk {turn.chunk}",
        "finish": "while gradients are reduced",
        "update": "in the optimizer's update",
    }[turn.name]
    copies = columns(one)["weight copies"]
    lines = [
        f"pipeline stage {one.pipeline_rank}, rank {one.rank}: {gib(one.allocated)} GiB are allocated at the worst "
        f"moment, {when} (turn {timeline.worst + 1} of {len(timeline.moments)}).",
        f"  between steps {gib(timeline.static_bytes + copies)} GiB; micro-batches in flight when it begins: {held}, "
        f"{gib(worst.start_bytes - timeline.static_bytes - copies)} GiB; this turn adds "
        f"{gib(worst.peak_bytes - worst.start_bytes)} GiB",
    ]
    dynamic: Counter[tuple[str, str]] = Counter()
    for row in one.rows:
        if row.kind not in COLUMNS["parameters"] + COLUMNS["gradients"] + COLUMNS["optimizer"]:
            dynamic[row.kind, _without_number(row.module)] += row.size
    for (kind, module), size in dynamic.most_common(10):
        lines.append(f"  {size / 2**20:>10,.1f} MiB  {kind:<22}{module}".rstrip())
    return "\n".join(lines)


def timeline_picture(one: Ledger, width: int = 72, height: int = 10) -> str:
    """Allocated bytes over the turns of a step, as columns of characters."""
    moments = one.timeline.moments
    buckets = [moments[index * len(moments) // width : (index + 1) * len(moments) // width] for index in range(width)]
    peaks = [max((moment.peak_bytes for moment in bucket), default=0) for bucket in buckets]
    peaks = [peak or peaks[index - 1] for index, peak in enumerate(peaks)]
    low, high = one.timeline.static_bytes, one.timeline.peak_bytes
    rows = []
    for level in range(height, 0, -1):
        bound = low + (high - low) * (level - 0.5) / height
        label = gib(high) if level == height else ""
        rows.append(f"{label:>9} {''.join('#' if peak >= bound else ' ' for peak in peaks).rstrip()}")
    rows.append(f"{gib(low):>9} {'-' * width} GiB, turns 1 to {len(moments)} of pipeline stage {one.pipeline_rank}")
    return "\n".join(rows)


def to_json(found: Sequence[Ledger], **facts: object) -> str:
    """Everything, for programs."""
    ranks = [
        {
            "rank": one.rank,
            "pipeline_rank": one.pipeline_rank,
            "verdict": one.verdict,
            "total_bytes": one.size,
            "low_bytes": one.low,
            "high_bytes": one.high,
            "allocated_peak_bytes": one.timeline.peak_bytes,
            "static_bytes": one.timeline.static_bytes,
            "by_kind": one.by_kind(),
            "worst_turn": {**one.timeline.moments[one.timeline.worst].turn._asdict(), "number": one.timeline.worst},
            "rows": [_row_fields(row) for row in one.rows],
        }
        for one in found
    ]
    surroundings = next((dataclasses.asdict(one.surroundings) for one in found if one.surroundings), None)
    return json.dumps({**facts, "surroundings": surroundings, "ranks": ranks}, indent=1)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:,.2f}"


def _row_fields(row: Row) -> dict[str, object]:
    fields: dict[str, object] = row._asdict()
    return {("bytes" if name == "size" else name): value for name, value in fields.items()}


def columns(one: Ledger) -> dict[str, int]:
    """Bytes of each of ``COLUMNS``."""
    kinds = one.by_kind()
    return {name: sum(kinds.get(kind, 0) for kind in members) for name, members in COLUMNS.items()}


def _shown(found: Sequence[Ledger]) -> list[str]:
    """Columns that a table of these ledgers has."""
    return [name for name in COLUMNS if name not in SELDOM or any(columns(one)[name] for one in found)]


def _grouped(found: Sequence[Ledger]) -> Iterator[tuple[str, Ledger]]:
    """Neighbouring stages with equal columns under one label."""
    for _, group in groupby(found, key=lambda one: tuple(columns(one).values())):
        same = list(group)
        first, last = same[0].pipeline_rank, same[-1].pipeline_rank
        yield (f"{first}" if first == last else f"{first} to {last}"), same[0]


def _layer_order(name: str) -> tuple[int, int, str]:
    number = name.rpartition("_")[2]
    order = {"embedding": 0, "layer": 1}.get(name.partition("_")[0], 2 if name else 3)
    return order, int(number) if number.isdigit() else 0, name


def _without_number(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
