"""The demo behind ``make demo``: real text, a tokenizer, a small model on four ranks, held-out loss, a plot, a sample.

Every command is printed as a user would type it. Takes a few minutes on two cores and works twice in a row: text and
corpus are kept, the run begins anew and the one before is moved aside.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEXT, CORPUS, RUN = Path("data/kjv.jsonl"), Path("data/kjv"), Path("runs/kjv")
PROMPT = "And it came to pass"


def main() -> int:
    """Run the demo from the repository's root, whatever the current directory is."""
    os.chdir(ROOT)
    started = time.monotonic()
    python = Path(sys.executable)
    mslm = str(python.parent / "mslm")
    run("1/5 real text", str(python), "examples/kjv/fetch_text.py", str(TEXT))
    run(
        "2/5 tokenizer and packed corpus",
        mslm, "data", "prepare", str(TEXT), "--output", str(CORPUS), "--vocab-size", "4096",
        "--licence", "public domain", quiet=True,
    )  # fmt: skip
    run(
        "3/5 training on four ranks: TP2 x PP2, sequence parallel", mslm, "train", "examples/kjv/config.yaml", "--fresh"
    )
    run("4/5 loss plot", str(python), "tools/plot_loss.py", str(RUN), "--output", str(RUN / "loss.png"))
    sample = run(
        "5/5 a sample",
        mslm, "generate", str(RUN), "--prompt", PROMPT, "--max-new-tokens", "80", quiet=True,
    )  # fmt: skip
    (RUN / "sample.txt").write_text(sample)
    print(sample)
    print(summary(time.monotonic() - started))
    return 0


def run(title: str, *command: str, quiet: bool = False) -> str:
    """Say and run one command; stop the demo when it fails.

    Args:
        quiet: take its standard output instead of showing it.
    """
    shown = [Path(part).name if index == 0 else part for index, part in enumerate(command)]
    print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def records(name: str) -> list[dict[str, Any]]:
    """The objects of one of the run's .jsonl files."""
    return [json.loads(line) for line in (RUN / name).read_text().splitlines()]


def summary(seconds: float) -> str:
    """The closing table."""
    steps, validations = records("metrics.jsonl"), records("validation.jsonl")
    before, after = (math.exp(record["lm_loss"]) for record in (validations[0], validations[-1]))
    speed = statistics.median(record["tokens_per_second"] for record in steps)
    step = (RUN / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip()
    rows = [
        ("held-out perplexity", f"{before:,.0f} before, {after:.1f} after {steps[-1]['step']} steps"),
        ("tokens per second", f"{speed:,.0f} (median step)"),
        ("checkpoint", f"{RUN}/checkpoints/iter_{int(step):07d}"),
        ("loss plot", f"{RUN}/loss.png"),
        ("sample", f"{RUN}/sample.txt"),
        ("TensorBoard", f"{RUN}/tensorboard"),
        ("time", f"{seconds / 60:.1f} minutes"),
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
    following = "\n".join(
        f"  .venv/bin/{command}"
        for command in (
            "mslm train examples/kjv/config.yaml train.train_iters=600   # goes on where this run ended",
            "mslm train examples/kjv/config.yaml name=one-rank --tensor-model-parallel-size 1 "
            "--pipeline-model-parallel-size 1 --no-sequence-parallel",
            f'mslm generate {RUN} --prompt "In the beginning"',
            "mslm data inspect examples/kjv/config.yaml --index 0",
            f"tensorboard --logdir {RUN}/tensorboard",
        )
    )
    return f"\n{table}\n\nnext:\n{following}"


if __name__ == "__main__":
    sys.exit(main())
