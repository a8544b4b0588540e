"""One GPU: ``mslm train`` of a 1B-class preset on packed real text; tokens/s, MFU and peak memory.

bf16, fp32 master weights and gradients, SDPA attention, no Transformer Engine needed. Without a GPU it says so.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests.bench.corpus import prepare_corpus  # noqa: E402

PRESET = "smollm2-1.7b"
WARM_UP_STEPS = 10


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps instead of 200")
    steps = 20 if parser.parse_args().quick else 200
    import torch

    if not torch.cuda.is_available():
        print("no NVIDIA GPU: torch.cuda.is_available() is false")
        print(json.dumps({"benchmark": "gpu_train", "skipped": "no NVIDIA GPU"}))
        return
    directory = Path(tempfile.mkdtemp(prefix="mslm-gpu-"))
    try:
        corpus = prepare_corpus(directory, 4096)
        train(corpus, directory, steps)
        lines = (directory / "gpu" / "metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(directory)
    records = [json.loads(line) for line in lines]
    steady = records[WARM_UP_STEPS:]
    result = {
        "benchmark": "gpu_train",
        "device": torch.cuda.get_device_name(),
        "preset": PRESET,
        "steps": len(records),
        "tokens_per_s": round(statistics.median(r["tokens_per_second"] for r in steady)),
        "mfu": steady[-1]["mfu"] and round(statistics.median(r["mfu"] for r in steady), 4),
        "peak_memory_gib": round(max(r["memory_bytes"] for r in records) / 2**30, 2),
        "first_loss": round(records[0]["lm_loss"], 3),
        "last_loss": round(records[-1]["lm_loss"], 3),
    }
    for name, value in result.items():
        print(f"{name:<16} {value}")
    print(json.dumps(result))


def train(corpus: Path, directory: Path, steps: int) -> None:
    """Run ``mslm train`` on one GPU."""
    command = [
        sys.executable, "-m", "megatron_slm.cli", "train", "--preset", PRESET, "name=gpu", f"log.runs_dir={directory}",
        f"data.data_path={corpus}", "parallel.device=cuda", "parallel.world_size=1", "precision.bf16=true",
        "model.seq_length=2048", "train.micro_batch_size=4", "train.global_batch_size=16", "train.eval_iters=0",
        f"train.train_iters={steps}", "schedule.lr_warmup_iters=10", "log.tensorboard=false",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


if __name__ == "__main__":
    main()
