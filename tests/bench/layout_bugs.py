"""Parallelism bugs planted into whole runs: does ``mslm replay layout-diff`` flag each, and name the module?

    python tests/bench/layout_bugs.py [--quick] [NAME ...]

Each bug (``tests/layout_bugs.py``) is patched into the real code of the ranks of one run, which is compared with a run
of the same model on one rank. *flagged* means that the verdict is "different", *named* that the place it gives is where
the bug is. Then layouts without a bug are compared, each with one rank: a verdict "different" is a false alarm, and so
is a place that is named nevertheless.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.config.load import Resolved  # noqa: E402
from megatron_slm.parallel import device  # noqa: E402

device.preload("cpu")

from megatron_slm.replay.layout_report import LayoutDifference  # noqa: E402
from megatron_slm.replay.layouts import layout_diff  # noqa: E402
from megatron_slm.replay.perturbed import perturbed_run  # noqa: E402
from megatron_slm.verify.tolerance import Unit  # noqa: E402
from megatron_slm.verify.witnessed import origins  # noqa: E402
from tests import runs  # noqa: E402
from tests.layout_bugs import BUGS, Plant, job_of  # noqa: E402
from tests.parallel_faults import CP, DP, EP, PP, SP, TP, Fault  # noqa: E402

MLA, EXPERTS, TIED, MTP = {"attention": "latent"}, {"mlp": "experts"}, {"embeddings": "tied"}, {"mtp": "1"}
CLEAN: dict[str, dict[str, str]] = {
    "tp2": TP,
    "pp2": PP,
    "dp2": DP,
    "cp2": CP,
    "tp2 pp2": TP | PP,
    "pp2 vpp2": PP | {"vpp": "2"},
    "tp2 dp2 sp": SP | DP,
    "dp2, replicated optimizer": DP | {"optimizer": "replicated"},
    "ep2": EP,
    "ep2 tp2": EP | SP,
    "experts, pp2": PP | EXPERTS,
    "experts, cp2": CP | EXPERTS,
    "shared experts, tp2": SP | {"mlp": "shared"},
    "latent attention, tp2": SP | MLA,
    "latent attention, pp2": PP | MLA,
    "predictions, pp2": PP | MTP,
    "predictions, tp2": SP | MTP,
    "predictions, cp2": CP | MTP,
    "tied, pp2": PP | TIED,
    "tied, tp2": TP | TIED,
    "learned positions, cp2": CP | {"positions": "learned"},
    "gpt2's layer, tp2": SP | {"layer": "gpt2", "biases": "all"},
}
"""Every model above has fewer groups of keys than heads (GQA)."""
QUICK = ("norms' gradients not summed", "tied embedding stale", "gradients averaged twice")
QUICK_CLEAN = ("tp2 dp2 sp",)


class Workshop:
    """Runs in one folder; each model's run on one rank, and itself under rounding errors, is made once."""

    def __init__(self, folder: Path) -> None:
        """Prepare a corpus."""
        self.folder = folder
        self._data = runs.corpus(folder)
        self._alone: dict[tuple[str, ...], Path] = {}

    def compare(self, values: dict[str, str], plant: Plant | None) -> LayoutDifference:
        """A run of some layout, perhaps with a bug, against one rank."""
        job = job_of(values)
        if job.model not in self._alone:
            alone = self.folder / f"one-{len(self._alone)}"
            self._train(alone, 1, (*job.model, "parallel.world_size=1"), None)
            with contextlib.redirect_stdout(sys.stderr):
                perturbed_run(alone, (1, 2), runs.start)
            self._alone[job.model] = alone
        alone, other = self._alone[job.model], self.folder / f"run-{len(list(self.folder.iterdir()))}"
        self._train(other, job.ranks, (*job.model, *job.layout), plant)
        moved = alone.with_name(f"{alone.name}-layout-diff") / "perturbed"

        def start(resolved: Resolved) -> int:
            return runs.start(resolved, plant if resolved.config.name == "second" else None)

        locate = partial(origins, start=start)
        with contextlib.redirect_stdout(sys.stderr):
            found = layout_diff((alone, other), lambda steps: moved, _tolerance, locate=locate)
            # Where nothing deviates nobody asks; here the answer is to be "nowhere".
            return found if found.looked else replace(found, origins=tuple(locate((alone, other), found.steps)))

    def _train(self, directory: Path, ranks: int, options: Sequence[str], plant: Plant | None) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            code = runs.train(directory, self._data, ranks, *options, plant=plant)
        if code != 0:
            raise SystemExit(f"{directory.name} ended with {code}")


def _tolerance(precision: str) -> Callable[[float], float]:
    return Unit(precision).tolerance


def judged(fault: Fault, found: LayoutDifference) -> tuple[bool, bool, str]:
    """(flagged, named, what was said) of a planted bug."""
    if found.equal:
        return False, False, "equal"
    if not found.origins:
        return True, False, "no origin"
    one = found.origins[0]
    said = f"step {one.step}: {one.module} ({one.what})"
    return True, fault.is_named_by(one.module, "update" if fault.direction == "update" else one.what), said


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line; 1 when a bug was missed or an alarm was false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"{len(QUICK)} of the bugs and one layout, within a minute"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only bugs and layouts whose name contains one")
    own = parser.parse_args(argv)
    bugs = [name for name in BUGS if _chosen(name, QUICK, own)]
    clean = [name for name in CLEAN if _chosen(name, QUICK_CLEAN, own)]
    answers: list[tuple[bool, bool]] = []
    alarms = 0
    started = time.monotonic()
    print(f"{'bug':<40} {'flagged':<8} {'named':<6} said", flush=True)
    with tempfile.TemporaryDirectory() as parent:
        workshop = Workshop(Path(parent))
        for name in bugs:
            flagged, named, said = judged(BUGS[name], workshop.compare(BUGS[name].values, BUGS[name].plant))
            answers.append((flagged, named))
            print(f"{name:<40} {'yes' if flagged else 'NO':<8} {'yes' if named else 'NO':<6} {said}", flush=True)
        for name in clean:
            found = workshop.compare(CLEAN[name], None)
            alarms += not found.equal or bool(found.origins)
            said = found.render() if not found.equal else f"equal, the farthest at {found.largest:.2g} of its tolerance"
            print(f"{name:<40} {said} {[*found.origins] or ''}", flush=True)
    record = {
        "bugs": len(bugs),
        "flagged_share": _share([flagged for flagged, _ in answers]),
        "named_share": _share([named for _, named in answers]),
        "layouts": len(clean),
        "false_alarms": alarms,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(record))
    return int(not all(flagged for flagged, _ in answers) or alarms > 0)


def _chosen(name: str, quick: Sequence[str], own: argparse.Namespace) -> bool:
    return (not own.quick or name in quick) and (not own.names or any(part in name for part in own.names))


def _share(answers: Sequence[bool]) -> float:
    return round(sum(answers) / len(answers), 3) if answers else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
