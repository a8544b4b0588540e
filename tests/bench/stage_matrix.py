"""Every stage under every layout and micro-batch size against one rank, three steps each, in float64 and float32.

    python tests/bench/stage_matrix.py [--quick] [STAGE ...]

{tp 1, 2} x {pp 1, 2} x {dp 1, 2} x {sp} x {micro-batch 1, 2, 4}, vpp 2 and cp 2, each stage of
``tests/stage_training.py``. In float64 what is logged, the first gradients and the weights after three steps
are compared. In float32, with two micro-batch sizes less, the loss and the gradients of the first step: from there on
Adam makes large differences of small ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slm.train.config import OptimizerConfig, PrecisionConfig, TrainConfig  # noqa: E402
from tests.pool import RankPool  # noqa: E402
from tests.stage_training import CONFIGS, train_stage  # noqa: E402
from tests.training import Outcome, Task, worst_difference  # noqa: E402

BAR, FP32_BAR = 1e-9, 1e-5
# Without clipping: core's norm is fp32, and so would be the factor that every gradient is multiplied by.
TASK = Task(
    iters=3,
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0),
    packed=True,
)


def layouts() -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Name, ranks, micro-batch size and degrees of every combination."""
    for tp, pp, dp, size in itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4)):
        for sp in (False, True) if tp > 1 else (False,):
            degrees: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            degrees |= {"sequence_parallel": sp, "use_distributed_optimizer": dp > 1}
            yield f"tp{tp} pp{pp} dp{dp}{' sp' if sp else ''} mbs{size}", tp * pp * dp, size, degrees
    yield "pp2 vpp2 mbs1", 2, 1, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    for size in (1, 2, 4):
        yield f"cp2 mbs{size}", 2, size, {"context_parallel_size": 2}
        yield (
            f"cp2 tp2 sp mbs{size}",
            4,
            size,
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
        )


SINGLE = replace(TASK, precision=PrecisionConfig())


def single_errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Of float32: the first loss relative to itself, a gradient relative to its norm."""
    first, wanted = found.losses[0], expected.losses[0]
    return {
        "first loss": abs(first - wanted) / max(abs(wanted), 1e-3),
        "gradients": worst_difference(found.gradients, expected.gradients)[0],
    }


def errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Worst differences: of what is logged absolutely, of a tensor relative to its norm."""
    return {
        "logged": max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)),
        "gradients": worst_difference(found.gradients, expected.gradients)[0],
        "weights": worst_difference(found.weights, expected.weights)[0],
    }


def main() -> None:
    """Print the worst of each stage, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=[], metavar="STAGE")
    parser.add_argument("--quick", action="store_true", help="two layouts of every stage")
    arguments = parser.parse_args()
    chosen = (
        [one for one in layouts() if one[0] in ("tp2 pp2 dp1 sp mbs2", "cp2 mbs4")] if arguments.quick else [*layouts()]
    )
    worst = dict.fromkeys(("logged", "gradients", "weights"), 0.0)
    worst_single = dict.fromkeys(("first loss", "gradients"), 0.0)
    comparisons = ((TASK, BAR, errors, worst), (SINGLE, FP32_BAR, single_errors, worst_single))
    compared, missed = 0, []
    with RankPool(8) as pool:
        for name in arguments.stages or CONFIGS:
            for task, bar, judge, known in comparisons:
                expected: Outcome = pool.call(train_stage, 1, task, name)[0]
                of_stage = dict.fromkeys(known, 0.0)
                for layout, world_size, size, degrees in chosen:
                    if task is SINGLE and size != 2 and not arguments.quick:
                        continue
                    own = replace(task, train=replace(TASK.train, micro_batch_size=size)).on(**degrees)
                    found = judge(pool.call(train_stage, world_size, own, name)[0], expected)
                    of_stage = {key: max(of_stage[key], found[key]) for key in found}
                    compared += 1
                    if max(found.values()) > bar:
                        missed.append(f"{name} {layout}")
                        print(f"{name} {layout}: {found}")
                kind = "float32" if task is SINGLE else "float64"
                told = "  ".join(f"{key} {value:.1e}" for key, value in of_stage.items())
                print(f"{name:16} {kind}  {told}", flush=True)
                known.update({key: max(known[key], of_stage[key]) for key in known})
    print(
        json.dumps(
            {
                "benchmark": "stage_matrix",
                "bar": BAR,
                **{f"worst_{key}": value for key, value in worst.items()},
                "fp32_bar": FP32_BAR,
                **{f"worst_fp32_{key.replace(' ', '_')}": value for key, value in worst_single.items()},
                "compared": compared,
                "missed": len(missed),
            }
        )
    )


if __name__ == "__main__":
    main()
