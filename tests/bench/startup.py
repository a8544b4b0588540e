"""Start-up: from typing the command to the end of step 1 with four ranks, TP2 x PP2.

``mslm train`` imports torch and core once and forks its ranks; the yardstick is the shortest loop over core under
torchrun, with core's plain imports (``bare_loop.py``). Both train the same model; ``mslm`` also opens its corpus,
writes its run directory and its log. Runs alternate; the ratio is the median of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
sys.path.append(str(ROOT))

from tests.bench import bare_loop  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

WORLD = 4


def mslm_seconds(corpus: Path, runs: Path) -> float:
    """Seconds to the console line of the first step."""
    model = bare_loop.MODEL
    command = [
        sys.executable, "-m", "megatron_slm.cli", "train", "name=startup", f"log.runs_dir={runs}", "--fresh",
        f"data.data_path={corpus}", "parallel.device=cpu", "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2", "parallel.sequence_parallel=true", "log.log_interval=1",
        "train.global_batch_size=2", "train.train_iters=1", "train.eval_iters=0",
        *(f"model.{key}={getattr(model, key)}" for key in (
            "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "seq_length")),
    ]  # fmt: skip
    return seconds_until(command, "iteration ")


def bare_seconds() -> float:
    """Seconds to the end of the yardstick's first step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    return seconds_until([*torchrun, str(BENCH / "bare_loop.py")], bare_loop.FIRST_STEP)


def seconds_until(command: list[str], marker: str) -> float:
    """Wall time from the start of ``command`` to the first line of its output that holds ``marker``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout is not None, "the output is a pipe"
    seconds = next((time.perf_counter() - started for line in process.stdout if marker in line), None)
    _, errors = process.communicate()
    if seconds is None or process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
    return seconds


def main() -> None:
    """Print each pair, then the medians, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair instead of five")
    pairs = 1 if parser.parse_args().quick else 5
    directory = Path(tempfile.mkdtemp(prefix="mslm-startup-"))
    try:
        corpus = prepare_corpus(directory, bare_loop.VOCAB)
        print(f"{'pair':>4} {'mslm train (s)':>15} {'bare, torchrun (s)':>19} {'ratio':>7}")
        rows = []
        for pair in range(pairs):
            rows.append((mslm_seconds(corpus, directory / "runs"), bare_seconds()))
            print(f"{pair:>4} {rows[-1][0]:>15.2f} {rows[-1][1]:>19.2f} {rows[-1][0] / rows[-1][1]:>7.3f}", flush=True)
    finally:
        shutil.rmtree(directory)
    ratio = statistics.median(ours / theirs for ours, theirs in rows)
    result = {"benchmark": "startup", "ratio": round(ratio, 4), "bar": "<= 0.5", "pairs": pairs}
    print(
        json.dumps(
            {**result, "mslm_s": statistics.median(r[0] for r in rows), "bare_s": statistics.median(r[1] for r in rows)}
        )
    )


if __name__ == "__main__":
    main()
