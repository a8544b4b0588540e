"""Memory predicted in the dry world beside what real ranks over gloo measure, over every axis, for every rank.

Bytes between steps, parameter by parameter, are those of the ranks' storages; activations of a micro-batch, layer by
layer, are what autograd holds when its forward pass ends (saved-tensor hooks); the peak is the most that torch's
profiler sees allocated at once in a step. Experts get an even share of tokens in both worlds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.parallel.device import preload  # noqa: E402

preload("cpu")

from megatron_slm.config.run_config import RunConfig  # noqa: E402
from megatron_slm.memory.rank import RankTrace  # noqa: E402
from megatron_slm.memory.replay import replay, saved_blocks  # noqa: E402
from megatron_slm.memory.schedule import FORWARD  # noqa: E402
from megatron_slm.memory.static import WORKSPACE  # noqa: E402
from megatron_slm.run_dry import job_trace  # noqa: E402
from megatron_slm.train.layer_norms import part_of  # noqa: E402
from tests.axes import case, config_of  # noqa: E402
from tests.memory_step import Measured, measured  # noqa: E402
from tests.pool import RankPool  # noqa: E402

RANKS = 4
SHAPE = {"seq_length": 512, "hidden_size": 128, "ffn_hidden_size": 384}
CASES: dict[str, dict[str, str]] = {
    "dp4": {"dp": "4", "samples": "2"},
    "dp4 bf16": {"dp": "4", "precision": "bf16"},
    "dp4 replicated optimizer": {"dp": "4", "optimizer": "replicated", "precision": "bf16"},
    "dp4 gpt2": {"dp": "4", "layer": "gpt2", "biases": "all", "positions": "learned", "clipping": "on"},
    "dp4 gather overlapped": {"dp": "4", "gather": "overlapped", "samples": "2"},
    "tp4": {"tp": "4", "embeddings": "tied"},
    "tp4 sp": {"tp": "4", "sp": "on", "samples": "2"},
    "tp2 dp2 sp bf16": {"tp": "2", "dp": "2", "sp": "on", "precision": "bf16"},
    "tp2 dp2 recompute attention": {"tp": "2", "dp": "2", "recompute": "attention"},
    "tp2 dp2 sp recompute all": {"tp": "2", "dp": "2", "sp": "on", "recompute": "uniform"},
    "pp4": {"pp": "4"},
    "pp4 bf16 recompute block": {"pp": "4", "precision": "bf16", "recompute": "block"},
    "pp2 tp2 sp tied": {"pp": "2", "tp": "2", "sp": "on", "embeddings": "tied"},
    "pp2 vpp2 dp2": {"pp": "2", "vpp": "2", "dp": "2"},
    "pp2 vpp2 tp2 sp mtp": {"pp": "2", "vpp": "2", "tp": "2", "sp": "on", "mtp": "1"},
    "cp4 all-gather": {"cp": "4", "exchange": "all_gather"},
    "cp2 dp2 ring": {"cp": "2", "dp": "2"},
    "cp2 pp2 bf16": {"cp": "2", "pp": "2", "precision": "bf16"},
    "ep4 dp4 experts": {"dp": "4", "mlp": "experts", "ep": "4"},
    "tp2 ep2 dp2 experts sp": {"tp": "2", "dp": "2", "sp": "on", "mlp": "experts", "ep": "2"},
    "tp2 ep2 dp2 experts recompute all": {
        "tp": "2", "dp": "2", "sp": "on", "mlp": "experts", "ep": "2", "recompute": "uniform",
    },
    "ep2 dp2 pp2 shared experts": {"dp": "2", "pp": "2", "mlp": "shared", "ep": "2"},
    "ep4 dp4 all-gather dispatcher": {"dp": "4", "mlp": "experts", "ep": "4", "dispatcher": "allgather"},
    "mla tp2 dp2 sp": {"tp": "2", "dp": "2", "sp": "on", "attention": "latent"},
    "mla pp2 dp2 recompute latents": {"pp": "2", "dp": "2", "attention": "latent", "recompute": "latents"},
    "mtp dp4 smoothed": {"dp": "4", "mtp": "1", "objective": "smoothed", "precision": "bf16"},
}  # fmt: skip
"""Values of ``tests.axes`` beside the plain ones, and of precision: fp32 or bf16."""
QUICK = ("dp4 bf16", "tp4 sp", "pp2 vpp2 dp2", "tp2 ep2 dp2 experts recompute all")


class Judged(NamedTuple):
    """One rank's prediction against its measurement.

    Attributes:
        static_differs: (kind, module) of what is held between steps, in other bytes than predicted.
        saved_differs: (chunk, layer) of activations that are.
        peak_pct: of the predicted peak, from the measured one.
    """

    rank: int
    static_rows: int
    static_differs: list[tuple[str, str]]
    saved_rows: int
    saved_differs: list[tuple[int, str]]
    measured_peak_bytes: int
    peak_pct: float


def case_config(values: dict[str, str]) -> RunConfig:
    """A case as the configuration of four ranks."""
    chosen = dict(values)
    precision = chosen.pop("precision", "fp32")
    config = config_of(case(**chosen))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **SHAPE),
        precision=dataclasses.replace(config.precision, fp64=False, bf16=precision == "bf16"),
    )


def judged(config: RunConfig, pool: RankPool, predicted_for: RunConfig | None = None) -> list[Judged]:
    """Every rank of a job, measured and predicted.

    Args:
        predicted_for: another configuration than that of the ranks.
    """
    world = config.parallel.world_size or RANKS
    found: list[Measured] = pool.call(measured, world, config)
    traces = [job_trace(predicted_for or config, rank, world_size=world, for_gpu=False) for rank in range(world)]
    return [judge(trace, one) for trace, one in zip(traces, found, strict=True)]


def judge(trace: RankTrace, found: Measured) -> Judged:
    """One rank."""
    static: Counter[tuple[str, str]] = Counter()
    for part in trace.static:
        static[part.kind, part.module] += part.size
    held = {key: size for key, size in static.items() if key[0] != WORKSPACE}
    measured_held = {key: size for key, size in found.static.items() if key[0] != WORKSPACE}
    saved = saved_by_layer(trace)
    measured_saved = {key: size for key, size in found.saved.items() if key[1]}
    peak = replay(trace).peak_bytes
    return Judged(
        trace.rank,
        len(held),
        sorted(key for key in held.keys() | measured_held.keys() if held.get(key) != measured_held.get(key)),
        len(saved),
        sorted(key for key in saved.keys() | measured_saved.keys() if saved.get(key) != measured_saved.get(key)),
        found.peak_bytes,
        100.0 * (peak - found.peak_bytes) / found.peak_bytes,
    )


def saved_by_layer(trace: RankTrace) -> dict[tuple[int, str], int]:
    """(chunk, layer) -> bytes that autograd holds of a micro-batch when its forward pass ends."""
    found: Counter[tuple[int, str]] = Counter()
    for number, chunk in saved_blocks(trace).items():
        block = trace.blocks[number]
        if block.module and number in trace.phases[FORWARD, chunk].packed:
            found[chunk, part_of(block.module)] += block.size
    return dict(found)


def measured_cases(names: list[str]) -> dict[str, list[Judged]]:
    """The ranks of every case."""
    with RankPool(RANKS) as pool:
        return {name: judged(case_config(CASES[name]), pool) for name in names}


def summary(found: dict[str, list[Judged]]) -> dict[str, Any]:
    """The figures of all cases together; shares are of (rank, row)."""
    ranks = [rank for judged_ranks in found.values() for rank in judged_ranks]
    static, saved = sum(rank.static_rows for rank in ranks), sum(rank.saved_rows for rank in ranks)
    return {
        "cpu_configurations": len(found),
        "cpu_ranks": len(ranks),
        "cpu_static_exact_share": round(1 - sum(len(rank.static_differs) for rank in ranks) / static, 6),
        "cpu_activation_exact_share": round(1 - sum(len(rank.saved_differs) for rank in ranks) / saved, 6),
        "cpu_peak_mean_pct": round(sum(abs(rank.peak_pct) for rank in ranks) / len(ranks), 3),
        "cpu_peak_worst_pct": round(max(abs(rank.peak_pct) for rank in ranks), 3),
    }


def table(found: dict[str, list[Judged]]) -> str:
    """One line for each case: its worst rank."""
    lines = [f"{'configuration':<36}{'held exact':>12}{'saved exact':>13}{'peak MiB':>10}{'worst peak':>12}"]
    for name, ranks in found.items():
        worst = max(ranks, key=lambda rank: abs(rank.peak_pct))
        static = sum(not rank.static_differs for rank in ranks)
        saved = sum(not rank.saved_differs for rank in ranks)
        cells = f"{f'{static}/{len(ranks)}':>12}{f'{saved}/{len(ranks)}':>13}{worst.measured_peak_bytes / 2**20:>10.2f}"
        lines.append(f"{name:<36}{cells}{f'{worst.peak_pct:+.2f} %':>12}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} configurations instead of {len(CASES)}")
    own = parser.parse_args()
    found = measured_cases([*QUICK] if own.quick else [*CASES])
    print(table(found))
    for name, ranks in found.items():
        for rank in ranks:
            if rank.static_differs or rank.saved_differs:
                print(f"{name}, rank {rank.rank}: held {rank.static_differs[:4]} saved {rank.saved_differs[:4]}")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
