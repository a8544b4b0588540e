"""Two results of the same items against each other, with an interval around each difference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.errors import DataError
from megatron_slm.evaluate.compared import COMPARED, Compared
from megatron_slm.evaluate.statistics import MIN_ITEMS, Difference, paired_bootstrap

RESULT_VERSION = 1
"""Raised when the numbers of a result would mean something else."""

NO_DIFFERENCE = "no real difference"


class Row(NamedTuple):
    """One number of one task, of both models."""

    task: str
    metric: str
    found: Difference
    larger_is_better: bool
    left_out: int

    @property
    def verdict(self) -> str:
        """Which model is better, or that these items do not tell."""
        if self.found.items < MIN_ITEMS:
            return f"too few items ({self.found.items})"
        if not self.found.real:
            return NO_DIFFERENCE
        return "B is better" if (self.found.difference > 0) == self.larger_is_better else "A is better"


def read_result(path: Path) -> dict[str, Any]:
    """A result of ``mslm eval --out``.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the result {path}: {error}. Give what mslm eval --out wrote.") from error
    version = found.get("result_version") if isinstance(found, dict) else None
    if version != RESULT_VERSION:
        raise DataError(f"{path} has result_version {version}, but this program reads {RESULT_VERSION}. Evaluate anew.")
    result: dict[str, Any] = found
    return result


def compare(first: dict[str, Any], second: dict[str, Any], *, resamples: int, seed: int) -> list[Row]:
    """Every number of every task.

    Raises:
        DataError: the results are not of the same tasks, items, tokens or way of drawing.
    """
    require_same(first, second)
    rows = []
    for one, other in zip(first["tasks"], second["tasks"], strict=True):
        for metric in COMPARED[one["kind"]]:
            rows.append(_row(one, other, metric, resamples=resamples, seed=seed))
    return rows


def require_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Refuse what cannot be compared item by item; see :func:`compare`."""
    for name, why in {
        "tokenizer_hash": "a loss by token, and what a prompt is, are of a tokenizer; compare models of one",
        "settings": "answers drawn in another way are not of the models alone; evaluate both alike",
    }.items():
        if first[name] != second[name]:
            raise DataError(f"A has {name} {first[name]}, B {second[name]}: {why}.")
    names = [[task["name"] for task in result["tasks"]] for result in (first, second)]
    if names[0] != names[1]:
        raise DataError(f"A has the tasks {', '.join(names[0])}, B {', '.join(names[1])}. Evaluate both on the same.")
    for one, other in zip(first["tasks"], second["tasks"], strict=True):
        if (one["kind"], one["digest"]) != (other["kind"], other["digest"]):
            raise DataError(
                f"The items of the task {one['name']} are not the same in A ({one['digest'][:12]}) and B "
                f"({other['digest'][:12]}). Evaluate both on one file."
            )


def _row(first: dict[str, Any], second: dict[str, Any], metric: Compared, *, resamples: int, seed: int) -> Row:
    both = [(a["values"], b["values"]) for a, b in zip(first["items"], second["items"], strict=True)]
    over = metric.over
    # Only what both have scored: else a model would gain where its answers cannot be judged.
    kept = [(a, b) for a, b in both if over is None or (a[over] and b[over])]
    if not kept:
        nothing = Difference(np.nan, np.nan, np.nan, np.nan, np.nan, 0)
        return Row(first["name"], metric.name, nothing, metric.larger_is_better, len(both))
    one, other = (np.array([pair[side][metric.sum] for pair in kept]) for side in (0, 1))
    weights = None
    if over is not None:
        weights, theirs = (np.array([pair[side][over] for pair in kept]) for side in (0, 1))
        if not np.array_equal(weights, theirs):  # samples without a score: each item counts once
            one, other, weights = one / weights, other / theirs, None
    found = paired_bootstrap(one, other, weights, resamples=resamples, seed=seed)
    return Row(first["name"], metric.name, found, metric.larger_is_better, len(both) - len(kept))


def table(rows: Sequence[Row]) -> str:
    """A line a number."""
    lines = [("task", "metric", "A", "B", "B - A", "95 % interval", "detectable", "items", "verdict")]
    for row in rows:
        one = row.found
        lines.append(
            (
                row.task,
                row.metric,
                f"{one.first:.4f}",
                f"{one.second:.4f}",
                f"{one.difference:+.4f}",
                f"[{one.low:+.4f}, {one.high:+.4f}]",
                f"{one.detectable:.4f}" if np.isfinite(one.detectable) else "-",
                f"{one.items}" + (f" ({row.left_out} left out)" if row.left_out else ""),
                row.verdict,
            )
        )
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width each."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
