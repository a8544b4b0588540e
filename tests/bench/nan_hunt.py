"""Is the first value that is not finite named? One is planted in each of many places of a run, and the run's last
sentence is held against what was planted: the step, the rank, the micro-batch, the module and tensor, the samples.

The runs are real ones: ``mslm train``'s composition of parts on forked ranks, a prepared corpus, the guard and its
policy "stop". A case counts only when all five are exactly what was planned; a fault that strikes once must be called
transient, with the gradient nearest the loss that it has spoilt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests import runs  # noqa: E402
from tests.faults import STEP, Fault, plant  # noqa: E402
from tests.ranks import RankFailure  # noqa: E402

TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYER = "decoder.layers."


@dataclass(frozen=True)
class Case:
    """One planted fault, the run it is planted in, and the tensor it should be called by."""

    name: str
    ranks: int
    fault: Fault
    tensor: str
    overrides: tuple[str, ...] = ()
    quick: bool = False


CASES = (
    Case(
        "weight of one tp rank", 2, Fault("parameter", LAYER + "2.mlp.linear_fc1", rank=1), "weight", (TP2,), quick=True
    ),
    Case("weight of a norm, one dp rank", 2, Fault("parameter", LAYER + "1.input_layernorm", rank=1), "weight"),
    Case("activation", 1, Fault("forward", LAYER + "1.mlp.linear_fc2", micro_batch=5), "output"),
    Case(
        "attention of one tp rank",
        2,
        Fault("forward", LAYER + "2.self_attention.core_attention", rank=1, micro_batch=3),
        "output",
        (TP2, "parallel.sequence_parallel=true"),
    ),
    Case(
        "gradient in the backward pass, pipeline",
        2,
        Fault("backward", LAYER + "1.self_attention.linear_proj", micro_batch=6),
        "gradient of the output",
        (PP2,),
    ),
    Case(
        "stage 1 of TP2 x PP2, one micro-batch",
        4,
        Fault("forward", LAYER + "3.self_attention.linear_qkv", rank=3, micro_batch=2),
        "output",
        (TP2, PP2),
        quick=True,
    ),
    Case(
        "recomputed layer, interleaved pipeline",
        2,
        Fault("forward", LAYER + "2.mlp", micro_batch=1),
        "output",
        (
            PP2,
            "parallel.virtual_pipeline_model_parallel_size=2",
            "train.recompute_granularity=full",
            "train.recompute_method=uniform",
            "train.recompute_num_layers=1",
        ),
    ),
    Case(
        "first moment, divided over dp ranks",
        2,
        Fault("optimizer state", LAYER + "0.mlp.linear_fc1", rank=1, tensor="exp_avg"),
        "exp_avg of the weight",
        (
            "parallel.use_distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ),
    ),
    Case(
        "second moment below zero",
        1,
        Fault("optimizer state", LAYER + "3.mlp.linear_fc2", tensor="exp_avg_sq"),
        "exp_avg_sq of the weight",
        quick=True,
    ),
    Case(
        "master copy, bf16",
        1,
        Fault("master copy", LAYER + "0.self_attention.linear_qkv"),
        "master copy of the weight",
        ("precision.bf16=true",),
    ),
    Case(
        "reduced gradient, one dp rank",
        2,
        Fault("reduction", LAYER + "0.mlp.linear_fc2", rank=1),
        "gradient of the weight",
    ),
    Case(
        "data of one dp rank",
        2,
        Fault("input", "loss_mask", rank=1, micro_batch=1),
        "loss_mask",
        ("train.micro_batch_size=2",),
    ),
    Case(
        "transient, pipeline",
        2,
        Fault("backward", LAYER + "1.self_attention.linear_proj", micro_batch=4, once=True),
        "gradient of the weight",
        (PP2,),
        quick=True,
    ),
)


def hunt(case: Case, data: Path, directory: Path) -> tuple[str, list[str]]:
    """Run the case; returns what the run said, and what of it is not as planned."""
    samples = directory / "samples.json"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runs.train(
                directory / "run",
                data,
                case.ranks,
                "train.train_iters=4",
                "train.eval_iters=0",
                *case.overrides,
                plant=partial(plant, case.fault, samples),
            )
    except RankFailure as failure:
        said = re.search(r"step \d+: the loss is .*", str(failure))
        if said is None:
            raise
        expected = json.loads(samples.read_text()) if samples.exists() else []
        return said[0], wrong(case, said[0], [] if case.fault.once else expected)
    return "", ["it was not noticed"]


def wrong(case: Case, said: str, samples: list[str]) -> list[str]:
    """Names of what is not as planned."""
    fault, transient = case.fault, "the fault was transient" in said
    place = case.tensor if fault.place == "input" else f"{case.tensor} of {fault.module}"
    micro_batch = re.search(r"micro-batch (\d+)", said)
    rank = re.search(r"rank (\d+) \(tp", said)
    checks = {
        "step": said.startswith(f"step {STEP}:"),
        "rank": rank is not None and int(rank[1]) == fault.rank,
        "micro-batch": (micro_batch and int(micro_batch[1])) == (None if fault.once else fault.micro_batch),
        "module": re.search(rf"elements of (the )?{re.escape(place)} ", said) is not None,
        "samples": re.findall(r"position \d+ \([^)]*\)", said) == samples,
        "transience": transient == fault.once,
    }
    return [name for name, right in checks.items() if not right]


def main() -> None:
    """Print a line for each case and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 of the cases")
    parser.add_argument("--sentences", action="store_true", help="print what each run said")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.quick or not arguments.quick]
    named = 0
    with tempfile.TemporaryDirectory(prefix="mslm-nan-") as name:
        data = runs.corpus(Path(name))
        for number, case in enumerate(cases):
            directory = Path(name) / str(number)
            directory.mkdir()
            said, problems = hunt(case, data, directory)
            named += not problems
            print(
                f"{case.name:42s} {case.ranks} ranks   {'named' if not problems else 'WRONG: ' + ', '.join(problems)}"
            )
            if arguments.sentences or problems:
                print(f"    {said}")
    print(json.dumps({"named_share": named / len(cases), "cases": len(cases)}))


if __name__ == "__main__":
    main()
