"""What a recording takes on disk: a run of four ranks at level ``layer``, whole and thinned to roots as it goes.

The smallest GPT that divides over two tensor-parallel and two data-parallel ranks trains for the given steps, twice:
once keeping every record, once with ``replay.keep_steps``. Sizes are those of the files that the runs leave; figures
for 10,000 steps are scaled where fewer were made, and the JSON says how many were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from megatron_slm.replay import stream  # noqa: E402
from megatron_slm.replay.stream import Flag  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

RANKS, STEPS, QUICK_STEPS, KEEP, QUICK_KEEP, VOCAB = 4, 10_000, 60, 100, 10, 512
OVERRIDES = (
    "parallel.device=cpu", "parallel.tensor_model_parallel_size=2", "model.num_layers=1", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.num_query_groups=2", "model.seq_length=16", "train.global_batch_size=2",
    "train.eval_iters=0", "replay.level=layer", "checkpoint.save_interval=1000000", "log.log_interval=1000",
    "log.progress_bar=false", "log.tensorboard=false",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of one run's recording, all ranks together.

    Attributes:
        steps: that have a frame, on the rank with the fewest.
        records: of frames kept whole.
        whole_bytes: of those frames and of the names.
        roots_bytes: of the frames thinned to roots.
        seconds: of the run.
    """

    steps: int
    records: int
    whole_bytes: int
    roots_bytes: int
    seconds: float


def rank(environment: RankEnvironment, overrides: list[str]) -> int:
    """One rank of ``mslm train``."""
    from megatron_slm import run
    from megatron_slm.config.load import load

    return run.train(load(None, overrides), environment, fresh=False)


def recorded(directory: Path, corpus: Path, name: str, steps: int, *overrides: str) -> Sizes:
    """Train, and measure what the run has left.

    Raises:
        SystemExit: the run has failed.
    """
    own = [f"name={name}", f"log.runs_dir={directory}", f"data.data_path={corpus}", f"train.train_iters={steps}"]
    work, started = partial(rank, overrides=[*OVERRIDES, *own, *overrides]), time.monotonic()
    code = run_local(RANKS, work, preload=partial(preload, "cpu"), warm=True)
    if code:
        raise SystemExit(code)
    return measured(directory / name / "replay", time.monotonic() - started)


def measured(folder: Path, seconds: float) -> Sizes:
    """The sizes of a recording; every byte of the streams is a frame's."""
    counts: list[int] = []
    records = whole = roots = 0
    for number in stream.ranks_in(folder):
        steps, path = set(), stream.stream_path(folder, number)
        for frame in stream.read_frames(path):
            size = stream.HEADER.size + len(frame.records) * stream.RECORD.itemsize
            thinned = Flag.ROOTS in frame.flags
            roots, whole = roots + size * thinned, whole + size * (not thinned)
            records += len(frame.records) * (not thinned)
            if Flag.START not in frame.flags:
                steps.add(frame.step)
        counts.append(len(steps))
        whole += stream.names_path(folder, number).stat().st_size
    return Sizes(min(counts), records, whole, roots, seconds)


def row(name: str, sizes: Sizes) -> str:
    """A line of the table."""
    each = sizes.whole_bytes / sizes.records
    sizes_mb = f"{sizes.whole_bytes / 1e6:>9.2f} {sizes.roots_bytes / 1e6:>9.3f}"
    return f"{name:<12} {sizes.steps:>6} {1e3 * sizes.seconds / sizes.steps:>8.1f} {each:>11.1f} {sizes_mb}"


def main() -> None:
    """Print a row for each of the two runs, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps a run instead of {STEPS}")
    parser.add_argument("--steps", type=int, help="of each run")
    given = parser.parse_args()
    steps, keep = given.steps or (QUICK_STEPS if given.quick else STEPS), QUICK_KEEP if given.quick else KEEP
    directory = Path(tempfile.mkdtemp(prefix="mslm-disk-"))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            corpus = prepare_corpus(directory, VOCAB)
            whole = recorded(directory, corpus, "whole", steps)
            thinned = recorded(directory, corpus, "thinned", steps, f"replay.keep_steps={keep}")
    finally:
        shutil.rmtree(directory)
    print(f"{'kept':<12} {'steps':>6} {'step ms':>8} {'B a record':>11} {'whole MB':>9} {'roots MB':>9}")
    print(row("all", whole) + "\n" + row(f"newest {keep}", thinned))
    thin_steps = thinned.steps - thinned.records * whole.steps / whole.records
    line = {
        "benchmark": "replay_disk",
        "ranks": RANKS,
        "steps_measured": min(whole.steps, thinned.steps),
        "bytes_per_tensor_step": round(whole.whole_bytes / whole.records, 2),
        "records_per_step": round(whole.records / whole.steps),
        f"whole_mb_{STEPS}_steps": round(whole.whole_bytes * STEPS / whole.steps / 1e6, 1),
        f"roots_mb_{STEPS}_steps": round(thinned.roots_bytes * STEPS / max(thin_steps, 1.0) / 1e6, 2),
        "keep_steps": keep,
        "thinned_mb": round((thinned.whole_bytes + thinned.roots_bytes) / 1e6, 2),
        "bar": "bytes <= 64, roots < 20 MB",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
