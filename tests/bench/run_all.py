"""Runs every benchmark of this folder and writes docs/benchmarks.md from what they print.

    python tests/bench/run_all.py [--quick] [NAME ...]

A benchmark is a program here that takes ``--quick``: it prints a table and, last, one line of JSON. The page is written
only when all of them ran in full and ended well; its part between the markers, measured by hand on a GPU, is kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured by hand: begin -->", "<!-- measured by hand: end -->"
NOTHING_BY_HAND = "Nothing yet."


@dataclass(frozen=True)
class Outcome:
    """What one benchmark printed, and how it ended."""

    name: str
    title: str
    table: str
    result: dict[str, Any]
    code: int
    seconds: float

    @property
    def problem(self) -> str | None:
        """Why its numbers cannot be used, or None."""
        if self.code:
            return f"{self.name} ended with exit code {self.code}"
        return None if self.result else f"{self.name} did not end with a line of JSON"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write the page. 0 when every benchmark ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each within a minute; the page is not written")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; the page is not written")
    given = parser.parse_args(argv)
    found = benchmarks(BENCH)
    unknown = sorted(set(given.names) - set(found))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(found)}")
    outcomes = [run(found[name], quick=given.quick) for name in found if not given.names or name in given.names]
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    print("\n" + summary(outcomes))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    if not given.quick and not given.names:
        kept = by_hand(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else NOTHING_BY_HAND
        PAGE.write_text(page(outcomes, kept), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def benchmarks(folder: Path) -> dict[str, Path]:
    """Name -> program, for every file that takes ``--quick`` but this one."""
    programs = sorted(path for path in folder.glob("*.py") if path != Path(__file__).resolve())
    return {path.stem: path for path in programs if '"--quick"' in path.read_text(encoding="utf-8")}


def run(path: Path, *, quick: bool) -> Outcome:
    """Run one benchmark, showing what it prints as it comes."""
    print(f"== {path.stem}", flush=True)
    started, lines = time.monotonic(), []
    command = [sys.executable, str(path), *(["--quick"] if quick else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None, "stdout is a pipe"
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).splitlines()[0]
    result = closing_json(lines[-1]) if lines else {}
    return Outcome(path.stem, title, "".join(lines[:-1]), result, process.returncode, time.monotonic() - started)


def closing_json(line: str) -> dict[str, Any]:
    """The object of a benchmark's last line; empty where the line is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def summary(outcomes: Sequence[Outcome]) -> str:
    """One row a benchmark: its name, what its JSON says, how long it took."""
    rows = ["| benchmark | result | seconds |", "|---|---|---|"]
    for outcome in outcomes:
        values = ", ".join(f"{key} {value}" for key, value in outcome.result.items() if key != "benchmark")
        rows.append(f"| {outcome.name} | {outcome.problem or values} | {outcome.seconds:.0f} |")
    return "\n".join(rows)


def machine() -> str:
    """The machine and the versions, in one sentence."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core", "numpy"))
    memory = psutil.virtual_memory().total / 2**30
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB, Python {platform.python_version()}, {versions}"


def page(outcomes: Sequence[Outcome], kept: str) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        f"Written by `make bench` on {date.today():%Y-%m-%d}; do not edit outside the markers. Machine: {machine()}.",
        "Ratios are medians of pairs that were interleaved in one run; absolute times are this machine's.",
        "`python tests/bench/NAME.py --quick` runs one of them within a minute.",
        summary(outcomes),
    ]
    for outcome in outcomes:
        parts += [f"## {outcome.name}", outcome.title, f"```text\n{outcome.table.rstrip()}\n```"]
    parts += ["## On a GPU", BEGIN, kept, END]
    return "\n\n".join(parts) + "\n"


def by_hand(text: str) -> str:
    """What stands between the markers of an earlier page."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{PAGE} has lost its markers {BEGIN} and {END}; put them around what was measured by hand")
    return text.partition(BEGIN)[2].partition(END)[0].strip() or NOTHING_BY_HAND


if __name__ == "__main__":
    sys.exit(main())
