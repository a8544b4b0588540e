"""Parallelism bugs of one line, planted one at a time: does ``mslm verify`` find each, and say where it is?

    python tests/bench/verify_faults.py [--quick] [NAME ...]

The bugs are those of ``tests/parallel_faults.py``; each is patched into the real code of the parallel job's ranks, and
never into the one-rank reference. *caught* means that a claim fails, *named* that the first module (or what else
``verify`` gives as the place) is where the bug is, *axis* that the axis without which it cannot show is among those
blamed. Every configuration is also compared without a bug: what differs then is a false alarm. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: several ranks share the cores
sys.path.append(str(Path(__file__).resolve().parents[2]))

from megatron_slm.config.run_config import RunConfig  # noqa: E402
from megatron_slm.verify.report import Report  # noqa: E402
from megatron_slm.verify.verify import verify  # noqa: E402
from tests.axes import RANKS  # noqa: E402
from tests.parallel_faults import FAULTS, Fault  # noqa: E402

QUICK = ("norms' gradients not summed", "ring skips a block", "dropped experts")


class Found(NamedTuple):
    """What ``verify`` has said of a bug."""

    caught: bool
    named: bool
    axis: bool
    place: str
    blamed: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line; 1 when a bug was missed or an alarm was false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three of the bugs, within a minute")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only bugs whose name contains one of these")
    given = parser.parse_args(argv)
    chosen = [
        fault
        for fault in FAULTS
        if (not given.quick or fault.name in QUICK)
        and (not given.names or any(name in fault.name for name in given.names))
    ]
    started = time.monotonic()
    print(f"{'bug':<38} {'axis':<10} {'caught':<6} {'named':<6} {'place':<62} {'blamed':<24} {'s':>5}")
    results = [measured(fault) for fault in chosen]
    alarms = false_alarms(chosen)
    record = {
        "faults": len(chosen),
        "caught_share": share([found.caught for found in results]),
        "named_share": share([found.named for found in results]),
        "axis_share": share([found.axis for found in results]),
        "clean_configurations": len(configurations(chosen)),
        "false_alarms": alarms,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(record))
    return int(record["caught_share"] < 1.0 or alarms > 0)


def measured(fault: Fault) -> Found:
    """One bug, and its line of the table."""
    started = time.monotonic()
    found = judged(fault, verify(fault.config, ranks=RANKS, plant=fault.plant))
    answers = "yes" if found.caught else "NO", "yes" if found.named else "NO"
    print(
        f"{fault.name:<38} {fault.axis:<10} {answers[0]:<6} {answers[1]:<6} {found.place:<62} {found.blamed:<24} "
        f"{time.monotonic() - started:>5.0f}",
        flush=True,
    )
    return found


def judged(fault: Fault, report: Report) -> Found:
    """What a report says of a planted bug."""
    wrong = [run for run in report.runs if not run.equal]
    if not wrong:
        return Found(False, False, False, "", "")
    first = wrong[0]
    named = any(fault.is_named_by(run.first_module, run.direction) for run in wrong)
    axis = any(fault.axis in (run.axis or "").split("+") for run in wrong)
    return Found(True, named, axis, f"{first.first_module} ({first.direction})", str(first.axis))


def false_alarms(faults: Sequence[Fault]) -> int:
    """How many configurations differ from one rank although nothing was planted."""
    alarms = 0
    for config in configurations(faults):
        report = verify(config, ranks=RANKS)
        if not report.equal:
            alarms += 1
            print(f"without a bug:\n{report.render()}", flush=True)
    return alarms


def configurations(faults: Sequence[Fault]) -> list[RunConfig]:
    """Every configuration that a bug is planted into, once."""
    return list(dict.fromkeys(fault.config for fault in faults))


def share(answers: Sequence[bool]) -> float:
    """Part of the answers that is yes."""
    return round(sum(answers) / len(answers), 3) if answers else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
