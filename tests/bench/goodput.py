"""Goodput, the time of kept steps over all time, of a run that loses a rank every so many steps.

    python tests/bench/goodput.py [--quick]

The same run of two ranks under `mslm train --restarts`, undisturbed and with a rank killed after every N steps more.
The run's own number (from its log) stands beside what a watch says from outside: steps kept times their mean time in
the undisturbed run, over the seconds from the first start to the end. What is missing from 1 is start-up, validation,
checkpoints, and steps made twice. Every run must end with the undisturbed run's last loss, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests.bench.corpus import prepare_corpus  # noqa: E402

VOCAB = 512
OVERRIDES = (
    "model.num_layers=4", "model.hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.seq_length=128", "train.global_batch_size=8", "train.eval_iters=0", "checkpoint.keep_last=2",
    "parallel.device=cpu", "parallel.tensor_model_parallel_size=2", "log.progress_bar=false", "log.tensorboard=false",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run: kills, its own goodput, seconds from start to end, mean seconds of a step, the last loss's bits."""

    every: int | None
    kills: int
    own: float
    seconds: float
    step_s: float
    bits: str

    def row(self, steps: int, step_s: float) -> str:
        """A line of the table."""
        name = "no fault" if self.every is None else f"every {self.every} steps"
        outside = steps * step_s / self.seconds
        return (
            f"{name:16} {self.kills:3} kills  goodput {self.own:6.1%} (outside {outside:6.1%}) in {self.seconds:6.1f} s"
        )


def run(work: Path, corpus: Path, steps: int, save_every: int, every: int | None) -> Outcome:
    """Train ``steps`` steps, and kill a rank after every ``every`` steps."""
    directory = work / f"every-{every}"
    own = (f"name={directory.name}", f"log.runs_dir={work}", f"data.data_path={corpus}")
    lengths = (f"train.train_iters={steps}", f"checkpoint.save_interval={save_every}")
    command = [sys.executable, "-m", "megatron_slm.cli", "train", *OVERRIDES, *own, *lengths, "--restarts", "1000"]
    started = time.monotonic()
    output = work / f"every-{every}.txt"
    with output.open("w") as stream:
        job = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"PYTHONPATH": str(ROOT)})
    kills, due = 0, every
    while job.poll() is None:
        time.sleep(0.02)
        if due is not None and due < steps and _step(directory) >= due:
            ranks = psutil.Process(job.pid).children()
            if ranks:
                ranks[kills % len(ranks)].send_signal(signal.SIGKILL)
                kills, due = kills + 1, due + (every or 0)
    seconds = time.monotonic() - started
    said = output.read_text()
    if job.returncode:
        raise SystemExit(f"the run with a fault every {every} steps ended with {job.returncode}:\n{said[-3000:]}")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    (percent,) = re.findall(r"^goodput ([\d.]+)%:", said, re.MULTILINE)
    step_s = mean(record["step_ms"] for record in records[1:]) / 1e3
    return Outcome(every, kills, float(percent) / 100, seconds, step_s, records[-1]["lm_loss_bits"])


def _step(directory: Path) -> int:
    """The last step recorded."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # being written
        return 0


def main() -> int:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, one rate of faults")
    quick = parser.parse_args().quick
    steps, save_every, rates = (120, 20, (60,)) if quick else (900, 30, (300, 150, 75))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        corpus = prepare_corpus(work, VOCAB)
        found = []
        for every in (None, *rates):
            found.append(run(work, corpus, steps, save_every, every))
            print(found[-1].row(steps, found[0].step_s), flush=True)
    same = len({one.bits for one in found}) == 1
    result = {
        "benchmark": "goodput",
        "steps": steps,
        "save_interval": save_every,
        "goodput": {"none" if one.every is None else str(one.every): one.own for one in found},
        "kills": sum(one.kills for one in found),
        "last_loss_is_the_same": same,
    }
    print(json.dumps(result))
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
