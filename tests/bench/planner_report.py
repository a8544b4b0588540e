"""How near the planner's memory and step times are to published measurements; writes docs/planner-accuracy.md.

    python tests/bench/planner_report.py [--runs CSV] [--quick]

Every row of the CSV is turned into a configuration, its memory is traced in the dry world and its step timed by the
planner. Constants are fitted on some tables and judged on others. Without ``--runs`` the short table of printed figures
beside this file is taken; the page is written only from the whole of a given CSV. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.append(str(Path(__file__).resolve().parents[2]))

from megatron_slm.errors import DataError, UserError  # noqa: E402
from megatron_slm.parallel import device  # noqa: E402

device.preload("cpu")

from tests.bench import planner_page as pages  # noqa: E402
from tests.bench.planner_findings import (  # noqa: E402
    Findings,
    Measured,
    judged_memory,
    planner_speed,
    step_times,
    wanted_memory,
)
from tests.bench.published import POINTS, Case, cases_of, read_rows  # noqa: E402
from tests.bench.published_dry import Predicted, predict_memory  # noqa: E402
from tests.bench.published_tables import readers  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner-accuracy.md"
QUICK_SECONDS = 15.0
"""Of tracing, with --quick."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=POINTS, metavar="CSV", help="published runs (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a sample of the rows, within a minute; no page")
    parser.add_argument("--cpu", type=Path, metavar="FILE", help="JSON line of the comparison on gloo ranks")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that trace (default: 1)")
    given = parser.parse_args(argv)
    try:
        cases = cases_of(read_rows(given.runs), readers())
        cpu = cpu_record(given.cpu)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    covered = [case for case in cases if isinstance(case, Case)]
    measured = trace_all(wanted_memory(covered), quick=given.quick, workers=given.workers)
    times = step_times(covered, quick=given.quick)
    findings = Findings(cases, judged_memory(covered, measured), times, planner_speed(quick=given.quick), cpu)
    text = pages.page(findings)
    print(text)
    if not given.quick and given.runs != POINTS:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.name}", file=sys.stderr)
    print(json.dumps(findings.record()))
    return 0


def cpu_record(path: Path | None) -> dict[str, Any]:
    """The last line of what the comparison on gloo ranks has printed; empty without it.

    Raises:
        DataError: it is no JSON object.
    """
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"--cpu {path} does not end with a line of JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"--cpu {path} ends with {found!r}, not with a JSON object.")
    return found


def trace_all(cases: Sequence[Case], *, quick: bool, workers: int) -> Measured:
    """Predicted memory of the cases, by :meth:`Case.key`; of those that cannot be traced, the reason.

    With ``quick`` the first rows of every source, until the time is over.
    """
    by_key = {case.key: case for case in cases}
    if quick:
        return _until(list(by_key.values()), QUICK_SECONDS)
    if workers == 1:
        return dict(map(_traced, by_key.values()))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return dict(pool.imap_unordered(_traced, by_key.values(), chunksize=4))


def _until(cases: list[Case], seconds: float) -> Measured:
    """The first of every source, then the second, until the time is over."""
    turn: dict[str, int] = {}
    order = []
    for case in cases:
        turn[case.row.source] = turn.get(case.row.source, 0) + 1
        order.append((turn[case.row.source], case))
    found: Measured = {}
    ends = time.monotonic() + seconds
    for _, case in sorted(order, key=lambda each: each[0]):
        if time.monotonic() > ends:
            break
        found.update([_traced(case)])
    return found


def _traced(case: Case) -> tuple[Any, Predicted | str]:
    """What the dry world says of a case; what stopped it there is part of the report, not its end."""
    predict: Callable[[Case], Predicted] = predict_memory
    try:
        return case.key, predict(case)
    except Exception as error:
        return case.key, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


if __name__ == "__main__":
    sys.exit(main())
