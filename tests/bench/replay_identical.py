"""Equal runs under every way to divide a model: is each fingerprint of the second run that of the first?

Every mix has three ranks or more: two ranks add in one order only. A mix is run twice, recorded at level ``layer``; the
runs' frames are compared record by record, with names, flags and the order they came in. Unequal files count even where
no record differs.
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
from itertools import zip_longest
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402 - reads how many threads there are

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.replay import stream  # noqa: E402
from tests import runs  # noqa: E402

RECORD = ("replay.level=layer", "replay.keep_batches=0", "train.eval_iters=0", "model.hidden_dropout=0.1",
          "checkpoint.save_interval=1000000")  # fmt: skip
TP2, PP2, CP2, EP2 = (f"parallel.{axis}_parallel_size=2" for axis in (
    "tensor_model", "pipeline_model", "context", "expert_model"))  # fmt: skip
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
EXPERTS = ("model.num_moe_experts=4", "model.moe_router_topk=2")
ALL_REDUCE = "parallel.use_distributed_optimizer=false"


@dataclass(frozen=True)
class Mix:
    """A layout of ``ranks`` ranks, and what the tiny model needs to divide so."""

    ranks: int
    overrides: tuple[str, ...]


MIXES = {
    "dp3": Mix(3, ("train.global_batch_size=6",)),
    "dp3, whole optimizer": Mix(3, ("train.global_batch_size=6", ALL_REDUCE)),
    "dp4, overlapped, bf16": Mix(4, ("precision.bf16=true", "parallel.overlap_param_gather=true")),
    "tp3": Mix(3, ("parallel.tensor_model_parallel_size=3", SP, "model.hidden_size=48", "model.num_query_groups=3",
                   "model.num_attention_heads=6", "model.ffn_hidden_size=96", "model.seq_length=36",
                   "model.make_vocab_size_divisible_by=129")),
    "tp4 sp": Mix(4, ("parallel.tensor_model_parallel_size=4", SP, "model.num_query_groups=4")),
    "pp3": Mix(3, ("parallel.pipeline_model_parallel_size=3", "model.num_layers=6")),
    "cp3": Mix(3, ("parallel.context_parallel_size=3", "model.seq_length=36")),
    "tp2 dp2 sp": Mix(4, (TP2, SP)),
    "tp2 pp2 sp": Mix(4, (TP2, PP2, SP)),
    "tp2 cp2 sp": Mix(4, (TP2, CP2, SP)),
    "pp2 vpp2 dp2": Mix(4, (PP2, VPP2)),
    "cp2 dp2": Mix(4, (CP2,)),
    "cp2 pp2": Mix(4, (CP2, PP2)),
    "ep2 dp4": Mix(4, (EP2, *EXPERTS)),
    "ep2 tp2 sp dp2": Mix(4, (EP2, TP2, SP, *EXPERTS)),
    "ep2 pp2": Mix(4, (EP2, PP2, *EXPERTS)),
}  # fmt: skip
"""Every axis, alone or with the next."""
QUICK = ("dp3", "tp2 pp2 sp", "ep2 tp2 sp dp2")


@dataclass(frozen=True)
class Found:
    """What two runs of one mix have recorded."""

    steps: int
    records: int
    differing: int
    files_equal: bool


def twice(folder: Path, data: Path, mix: Mix, steps: int) -> Found:
    """Run a mix two times, and compare.

    Raises:
        AssertionError: a run has failed.
    """
    for name in ("first", "second"):
        length, patience = f"train.train_iters={steps}", 120.0 + 10.0 * steps
        code = runs.train(folder / name, data, mix.ranks, *RECORD, *mix.overrides, length, timeout_s=patience)
        assert code == 0, f"exit code {code}"
    return compared(folder / "first" / "replay", folder / "second" / "replay")


def compared(first: Path, second: Path) -> Found:
    """Every record of every rank; one that the other run does not have differs."""
    steps: set[int] = set()
    records = differing = 0
    ranks = stream.ranks_in(first)
    equal = ranks == stream.ranks_in(second)
    for rank in ranks:
        paths = [stream.stream_path(folder, rank) for folder in (first, second)]
        names = [stream.names_path(folder, rank) for folder in (first, second)]
        equal = equal and all(one.read_bytes() == other.read_bytes() for one, other in (paths, names))
        for one, other in zip_longest(*(stream.read_frames(path) for path in paths)):
            own, theirs = (_rows(frame) for frame in (one, other))
            common, longer = sorted((len(own), len(theirs)))
            records += longer
            differing += longer - common + int((own[:common] != theirs[:common]).any(axis=1).sum())
            steps |= {frame.step for frame in (one, other) if frame is not None}
    return Found(len(steps - {0}), records, differing, equal)


def _rows(frame: stream.Frame | None) -> np.ndarray:
    """The bytes of its records [records, bytes]."""
    data = b"" if frame is None else frame.records.tobytes()
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, stream.RECORD.itemsize)


def main() -> None:
    """Print a row for each mix, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} for 10 steps instead of all for 100")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("mixes", nargs="*", metavar="MIX", help=f"only these of: {'; '.join(MIXES)}")
    given = parser.parse_args()
    chosen = given.mixes or (QUICK if given.quick else tuple(MIXES))
    steps = given.steps or (10 if given.quick else 100)
    directory = Path(tempfile.mkdtemp(prefix="mslm-identical-"))
    records = differing = unequal = 0
    try:
        with contextlib.redirect_stdout(sys.stderr):
            data = runs.corpus(directory)
        print(f"{'mix':<24} {'ranks':>5} {'steps':>6} {'records':>9} {'differing':>9} {'files':<8} {'seconds':>7}")
        for name in chosen:
            started = time.monotonic()
            folder = directory / name.replace(" ", "-").replace(",", "")
            with contextlib.redirect_stdout(sys.stderr):
                found = twice(folder, data, MIXES[name], steps)
            shutil.rmtree(folder)
            files, seconds = "equal" if found.files_equal else "UNEQUAL", time.monotonic() - started
            counts = f"{found.steps:>6} {found.records:>9} {found.differing:>9}"
            print(f"{name:<24} {MIXES[name].ranks:>5} {counts} {files:<8} {seconds:>7.1f}", flush=True)
            records, differing = records + found.records, differing + found.differing
            unequal += not found.files_equal
    finally:
        shutil.rmtree(directory)
    line = {"benchmark": "replay_identical", "mixes": len(chosen), "steps": steps, "runs_each": 2}
    print(json.dumps(line | {"records_compared": records, "differing": differing, "mixes_with_unequal_files": unequal}))


if __name__ == "__main__":
    main()
