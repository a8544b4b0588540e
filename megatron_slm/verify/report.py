"""The verdict: what was claimed of each run, whether it held, and where it did not. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

WIDTH = 118


@dataclass(frozen=True)
class Claim:
    """One thing that must be equal on n ranks and on one.

    Attributes:
        precision: in which it was compared.
        error: relative to the one-rank value; infinite where bits that must be the same are not.
        tolerance: the largest error that counts as equal; 0 demands the same bits.
        detail: what the error is of: the worst tensor, the two values.
        failing: names of the tensors that differ.
        all_fail: every tensor differs.
    """

    name: str
    precision: str
    equal: bool
    error: float
    tolerance: float
    detail: str = ""
    failing: tuple[str, ...] = ()
    all_fail: bool = False


@dataclass
class RunReport:
    """One layout against one rank."""

    layout: str
    """In words: ranks, degrees, options."""
    name: str
    rows: list[Claim] = field(default_factory=list)
    first_module: str | None = None
    """The first module, in execution order, that differs; None where all is equal or nothing could be compared."""
    direction: str | None = None
    """Where it differs: forward, backward, gradient, loss, update, resume."""
    axis: str | None = None
    """The smallest set of axes and options that still differs."""
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether every claim holds."""
        return all(row.equal for row in self.rows)

    @property
    def failed(self) -> list[Claim]:
        """The claims that do not hold."""
        return [row for row in self.rows if not row.equal]


@dataclass
class Report:
    """What ``mslm verify`` has found."""

    title: str
    runs: list[RunReport]
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What downscaling and the comparison itself changed: key, before, after, reason."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether every claim of every run holds."""
        return all(run.equal for run in self.runs)

    def render(self, *, verbose: bool = False) -> str:
        """The report to read.

        Args:
            verbose: every change that was made to the configuration, and the detail of every claim.
        """
        lines = [*textwrap.wrap(self.title, WIDTH), *self._changes(verbose)]
        for note in self.notes:
            lines += textwrap.wrap(note, WIDTH)
        for number, run in enumerate(self.runs, 1):
            lines += ["", f"run {number} of {len(self.runs)}: {run.layout} ({run.seconds:.0f} s)"]
            lines += [*_table(run, verbose), *_verdict(run)]
        different = f"{sum(not run.equal for run in self.runs)} of {len(self.runs)} runs DIFFER from one rank"
        verdict = f"all {sum(len(run.rows) for run in self.runs)} claims hold" if self.equal else different
        return "\n".join([*lines, "", f"{verdict} ({self.seconds:.0f} s)"])

    def to_json(self) -> str:
        """The same, for programs."""
        fields = dataclasses.asdict(self)
        for run, written in zip(self.runs, fields["runs"], strict=True):
            written["equal"] = run.equal
            for row in written["rows"]:
                row["error"] = row["error"] if math.isfinite(row["error"]) else None  # JSON has no infinity
        return json.dumps({"equal": self.equal, **fields}, indent=1)

    def _changes(self, verbose: bool) -> Iterator[str]:
        if not self.changes:
            return
        keys = ", ".join(change["key"] for change in self.changes)
        if not verbose:
            yield from textwrap.wrap(f"changed for the comparison (--verbose says how): {keys}", WIDTH)
            return
        yield "changed for the comparison:"
        for change in self.changes:
            yield f"  {change['key']}: {change['before']} -> {change['after']}  ({change['reason']})"


def _table(run: RunReport, verbose: bool) -> Iterator[str]:
    yield f"  {'precision':<9}  {'claim':<52}  {'equal':<5}  {'error':>8}  {'tolerance':>9}"
    for row in run.rows:
        bound = f"{row.tolerance:.1e}" if row.tolerance else "same bits"
        equal = "yes" if row.equal else "NO"
        yield f"  {row.precision:<9}  {row.name:<52}  {equal:<5}  {_number(row.error):>8}  {bound:>9}"
        if row.detail and (verbose or not row.equal):
            yield from textwrap.wrap(row.detail, WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 13)


def _number(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


def _verdict(run: RunReport) -> Iterator[str]:
    if run.equal:
        return
    where = f"{run.first_module} ({run.direction})" if run.first_module else "nothing could be compared"
    yield f"  first module that differs: {where}"
    yield f"  axis: {run.axis or 'not isolated'}"
