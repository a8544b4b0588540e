"""The demo behind ``make demo-align``: from random weights to a tuned policy on one task, before and after.

SFT, reward model, DPO and GRPO at TP2, each measured on the same 512 questions that no stage has seen, with intervals.
Every command is printed as a user would type it. Less than ten minutes on two cores; each time in a new directory.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.sorting.pipeline import ROOT, Pipeline
from megatron_slm.evaluate.statistics import Difference, paired_bootstrap


def main() -> None:
    """Train and measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where everything goes (default: runs/demo-align-TIME)")
    arguments = parser.parse_args()
    work = arguments.work or ROOT / "runs" / f"demo-align-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    started = time.monotonic()
    pipeline = Pipeline(work, arguments.seed, tell=lambda text: print(f"  {text}", flush=True))
    print(f"Everything goes to {work}; the commands run there.\n\nThe task: sort six digits. 4 1 3 5 9 2 = 1 2 3 4 5 9")
    pipeline.compile()
    rows = stages(pipeline)
    print(table(rows, time.monotonic() - started))


def stages(pipeline: Pipeline) -> list[tuple[str, str, Difference]]:
    """(stage, what was measured, before and after) of every stage."""
    print("\nSFT, from random weights")
    base = pipeline.train("sft", "sort-sft")
    answered = pipeline.answers(base)
    rows = [("sft", "questions answered", against(np.zeros_like(answered), answered))]

    print("\nA reward model, on right answers beside spoilt ones")
    ranked = pipeline.ranked(pipeline.train("reward", "sort-reward", "train.eval_iters=50"))
    rows.append(("reward", "pairs ranked (before: chance)", against(np.full_like(ranked, 0.5), ranked)))

    print("\nDPO, on right answers beside its own mistakes")
    pipeline.mistakes(base)
    preferred = pipeline.preferences(base)
    dpo = pipeline.train("dpo", "sort-dpo")
    rows.append(("dpo", "pairs preferred", against(preferred, pipeline.preferences(dpo))))
    rows.append(("dpo", "questions answered", against(answered, pipeline.answers(dpo))))

    print("\nGRPO, on its own answers and an exact reward")
    grpo = pipeline.train("grpo", "sort-grpo")
    rows.append(("grpo", "questions answered", against(answered, pipeline.answers(grpo))))
    for run in ("sort-dpo", "sort-grpo"):
        print(f"  found: {', '.join(pipeline.findings(f'runs/{run}')) or 'nothing'}")
    return rows


def against(before: NDArray[np.float64], after: NDArray[np.float64]) -> Difference:
    """A paired 95 % interval over the same items."""
    return paired_bootstrap(before, after)


def table(rows: list[tuple[str, str, Difference]], seconds: float) -> str:
    """Before, after, and whether it is a difference."""
    lines = ["", f"{'stage':8} {'measured on held-out items':32} {'before':>7} {'after':>7}  95 % of the difference"]
    for stage, measured, found in rows:
        verdict = "better" if found.low > 0.0 else "worse" if found.high < 0.0 else "no real difference"
        interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
        lines.append(f"{stage:8} {measured:32} {found.first:7.3f} {found.second:7.3f}  {interval} {verdict}")
    minutes, rest = divmod(round(seconds), 60)
    return "\n".join([*lines, "", f"took {minutes} min {rest} s"])


if __name__ == "__main__":
    main()
