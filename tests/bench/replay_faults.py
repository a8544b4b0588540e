"""Causes planted into recorded runs: does ``mslm replay diff`` name the place and the class of the cause?

Each cause makes one of two runs part from the other in a known step, on a known rank, in a known phase and tensor. A
place counts as located when step, rank, phase and tensor are named: from recordings of level `layer`, without a replay.
One cause is bisected from recordings of level `light`, and its replays are counted. Equal runs are compared beside
that: each that is called different is a false alarm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.data.prepare import prepare  # noqa: E402
from megatron_slm.replay.bisect import bisect  # noqa: E402
from megatron_slm.replay.capsule import Capsule  # noqa: E402
from megatron_slm.replay.cause import cause  # noqa: E402
from megatron_slm.replay.diff import Divergence, first_divergence  # noqa: E402
from megatron_slm.replay.report import phase_name  # noqa: E402
from megatron_slm.replay.step import replay_step  # noqa: E402
from tests import replay_plants as plants, runs  # noqa: E402

RECORD = ("replay.level=layer", "train.train_iters=3", "train.eval_iters=0", "model.hidden_dropout=0.1")
DP = ("parallel.overlap_grad_reduce=true",)
DP_WHOLE = (*DP, "parallel.use_distributed_optimizer=false", "train.global_batch_size=6")
TP_PP = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
EXPERTS = ("model.num_moe_experts=4", "parallel.expert_model_parallel_size=2", "model.moe_router_topk=2")
ONE_WIDE = (
    "model.hidden_size=256",
    "model.seq_length=128",
    "model.normalization=LayerNorm",
    "train.micro_batch_size=8",
)
"""Large enough that threads divide the sum of a norm's weight gradient."""
Plant = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """One cause and where it shows first.

    Attributes:
        layout: of both runs; ``ranks`` of them.
        overrides: of the struck run alone.
        environment: of the struck run's process alone, which then is a process of its own, as the other's.
        data: the struck run's corpus: "" for the same, "shard", "tokenizer".
        resumed: the struck run is stopped behind step 2, and planted in when it is resumed.
        ranks_named: where it may be seen first.
        tensor: what its name begins with.
    """

    step: int
    ranks_named: tuple[int, ...]
    phases: tuple[str, ...]
    tensor: str
    kind: str
    layout: tuple[str, ...] = DP
    ranks: int = 4
    plant: Plant | None = None
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    data: str = ""
    resumed: bool = False


ANY = (0, 1, 2, 3)
CORRUPT, CONFIGURED, ORDER = "silent corruption", "configuration", "communication order"
LOCAL, OUTPUT = ("local gradient",), ("output",)
FAULTS: dict[str, Fault] = {
    "gradient, lowest bit": Fault(
        2, (2,), LOCAL, plants.STRUCK, CORRUPT, plant=partial(plants.gradient_bit, 2, 0)
    ),
    "gradient, high bit": Fault(
        2, (1,), LOCAL, plants.STRUCK, CORRUPT, plant=partial(plants.gradient_bit, 1, 5)
    ),
    "gradient dropped": Fault(2, (3,), LOCAL, plants.STRUCK, CORRUPT, plant=partial(plants.gradient_dropped, 3)),
    "reduced gradient": Fault(
        2, (1,), ("gradient",), plants.STRUCK, CORRUPT, DP_WHOLE, 3, partial(plants.reduced_gradient_bit, 1)
    ),
    "activation": Fault(2, (2,), OUTPUT, plants.LAYER, CORRUPT, plant=partial(plants.activation_bit, 2)),
    "expert choice": Fault(
        2, (1,), OUTPUT, f"{plants.LAYER}.mlp.router", CORRUPT, (*DP, *EXPERTS), plant=partial(plants.expert_choice, 1)
    ),
    "swapped samples": Fault(2, (1,), ("batch",), "", "data", plant=partial(plants.swapped_micro_batches, 1)),
    "one token": Fault(2, (3,), ("batch",), "tokens", "data", plant=partial(plants.one_token, 3)),
    "random draw": Fault(2, (3,), ("rng",), "", "random numbers", TP_PP, 4, partial(plants.random_draw, 3)),
    "dropout seed": Fault(0, ANY, ("rng",), "", "random numbers", plant=plants.dropout_seed),
    "stale parameter": Fault(
        2, (2,), ("parameter",), plants.STRUCK, CORRUPT, DP_WHOLE, 3, partial(plants.stale_parameter, 2)
    ),
    "optimizer's moment": Fault(2, (1,), ("optimizer",), "", CORRUPT, plant=partial(plants.moment_bit, 1)),
    "learning rate a step off": Fault(
        1, ANY, ("parameter", "optimizer"), "", CONFIGURED, plant=plants.learning_rate_one_step_late
    ),
    "buckets": Fault(
        1, (0, 1, 2), ("gradient",), "", ORDER, DP_WHOLE, 3, overrides=("parallel.ddp_bucket_size=20000",)
    ),
    "reduction in fp32": Fault(
        1, ANY, ("gradient",), "", ORDER, overrides=("parallel.reduce_scatter_with_fp32_accumulation=true",)
    ),
    "format": Fault(0, ANY, ("parameter", "optimizer"), "", CONFIGURED, overrides=("precision.bf16=true",)),
    "epsilon": Fault(
        1, (0,), OUTPUT, "decoder.layers.0", CONFIGURED, TP_PP, overrides=("model.layernorm_epsilon=1e-4",)
    ),
    "order of samples": Fault(1, ANY, ("batch",), "", CONFIGURED, overrides=("data.data_seed=5",)),
    "stale shard": Fault(1, ANY, ("batch",), "", "data", data="shard"),
    "tokenizer": Fault(1, ANY, ("batch",), "", "data", data="tokenizer"),
    "resumed a sample off": Fault(
        3, ANY, ("batch",), "", "data", plant=partial(plants.cursor_one_further, 16), resumed=True
    ),
    "threads": Fault(
        1, (0,), ("output gradient", "local gradient", "gradient", *OUTPUT), "", "kernel or thread count",
        ONE_WIDE, 1, environment={"OMP_NUM_THREADS": "2"},
    ),
    "instruction set": Fault(
        1, (0,), ("output", "loss", "output gradient", "local gradient"), "", "kernel or thread count",
        ONE_WIDE, 1, environment={"ATEN_CPU_CAPABILITY": "default"},
    ),
}  # fmt: skip
QUICK = ("gradient, lowest bit", "one token", "buckets", "learning rate a step off")


@dataclass(frozen=True)
class Judged:
    """What was named of one fault."""

    located: bool
    caused: bool
    said: str


class Workshop:
    """Runs and their corpora in one folder; of every layout the undisturbed run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._corpora = {"": runs.corpus(folder)}
        self._undisturbed: dict[object, Path] = {}

    def judge(self, name: str, fault: Fault) -> Judged:
        """Train with and without a fault, and compare."""
        struck = self.folder / name.replace(" ", "-").replace("'", "").replace(",", "")
        options = (*RECORD, *fault.layout, *fault.overrides, "model.vocab_size=512")
        data = self._corpus(fault.data)
        if fault.environment:
            self._command(struck, data, options, fault.environment)
        elif fault.resumed:
            self._train(struck, data, fault.ranks, (*options, "train.exit_interval=2"), None)
            self._train(struck, data, fault.ranks, options, fault.plant)
        else:
            self._train(struck, data, fault.ranks, options, fault.plant)
        first, second = Capsule.of(self.undisturbed(fault)), Capsule.of(struck)
        found = first_divergence(first, second)
        if found is None:
            return Judged(False, False, "equal")
        why = cause(first, second, found)
        said = f"step {found.step}, rank {found.rank}, {phase_name(found.key.phase)} {found.tensor}: {why.kind}"
        return Judged(is_located(fault, found), why.kind == fault.kind, said)

    def undisturbed(self, fault: Fault) -> Path:
        """The run without any fault in a fault's layout."""
        key = (fault.layout, fault.ranks, bool(fault.environment))
        if key not in self._undisturbed:
            directory = self.folder / f"undisturbed-{len(self._undisturbed)}"
            options = (*RECORD, *fault.layout, "model.vocab_size=512")
            if fault.environment:
                self._command(directory, self._corpora[""], options, {})
            else:
                self._train(directory, self._corpora[""], fault.ranks, options, None)
            self._undisturbed[key] = directory
        return self._undisturbed[key]

    def again(self, number: int) -> bool:
        """Whether one more undisturbed run is called different."""
        layout, ranks = ((DP, 4), (TP_PP, 4), (DP_WHOLE, 3))[number % 3]
        fault = Fault(0, (), (), "", "", layout, ranks)
        directory = self.folder / "again"
        self._train(directory, self._corpora[""], ranks, (*RECORD, *layout, "model.vocab_size=512"), None)
        found = first_divergence(Capsule.of(self.undisturbed(fault)), Capsule.of(directory))
        shutil.rmtree(directory)
        return found is not None

    def replays(self) -> int:
        """How many steps are made again to name an operation from recordings that lack every module's output."""
        layout = ("parallel.world_size=2", "parallel.pipeline_model_parallel_size=2", "replay.level=light")
        for name, own in (("coarse", ()), ("coarse-epsilon", ("model.layernorm_epsilon=1e-3",))):
            self._train(self.folder / name, self._corpora[""], 2, (*RECORD, *layout, *own), None)
        first, second = Capsule.of(self.folder / "coarse"), Capsule.of(self.folder / "coarse-epsilon")
        with contextlib.redirect_stdout(sys.stderr):
            found = bisect(first, second, lambda capsule, step: replay_step(capsule, step, runs.start, capture="op"))
        print(found.render().splitlines()[-1] if found.divergence is None else f"bisected: {found.descent[-1]}")
        return found.replays

    def _corpus(self, kind: str) -> Path:
        if kind not in self._corpora:
            text = self.folder / "stdlib.txt"
            changed, output = self.folder / f"{kind}.txt", self.folder / f"corpus-{kind}"
            changed.write_text(text.read_text().replace("argument", "parameter"))
            if kind == "tokenizer":
                prepare([changed], self.folder / "other", vocab_size=512)
                model = next((self.folder / "other" / "tokenizer").glob("*.model"))
                prepare([text], output, tokenizer_model=model)
            else:
                model = next((self._corpora[""] / "tokenizer").glob("*.model"))
                prepare([changed], output, tokenizer_model=model)
            self._corpora[kind] = output
        return self._corpora[kind]

    @staticmethod
    def _train(directory: Path, data: Path, ranks: int, options: tuple[str, ...], plant: Plant | None) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            code = runs.train(directory, data, ranks, *options, plant=plant)
        if code not in (0, 75):
            raise SystemExit(f"{directory.name} ended with {code}")

    @staticmethod
    def _command(directory: Path, data: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "megatron_slm.cli", "train", *runs.given(directory, data, *options)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        subprocess.run(command, check=True, env=environ, capture_output=True)


def is_located(fault: Fault, found: Divergence) -> bool:
    """Whether a fault's own step, rank, phase and tensor were named."""
    return (
        found.step == fault.step
        and found.rank in fault.ranks_named
        and phase_name(found.key.phase) in fault.phases
        and found.tensor.startswith(fault.tensor)
    )


def main() -> None:
    """Judge every fault, then equal runs; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of {len(FAULTS)} faults, 2 equal runs")
    parser.add_argument("--equal", type=int, default=50, metavar="N", help="equal runs (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME", help="this fault alone")
    own = parser.parse_args()
    names = [own.only] if own.only else [*QUICK] if own.quick else [*FAULTS]
    equal = 0 if own.only else 2 if own.quick else own.equal
    with tempfile.TemporaryDirectory() as parent:
        workshop = Workshop(Path(parent) / "runs")
        judged = {}
        for name in names:
            judged[name] = one = workshop.judge(name, FAULTS[name])
            marks = f"{'located' if one.located else 'MISSED':<8} {'named' if one.caused else 'OTHER':<6}"
            print(f"{name:<26} {marks} {one.said}", flush=True)
        replays = 0 if own.only else workshop.replays()
        alarms = sum(workshop.again(number) for number in range(equal))
    print(
        json.dumps(
            {
                "faults": len(judged),
                "located_share": round(sum(one.located for one in judged.values()) / len(judged), 4),
                "cause_share": round(sum(one.caused for one in judged.values()) / len(judged), 4),
                "max_replays": replays,
                "equal_runs": equal,
                "false_alarms_in_50" if equal == 50 else f"false_alarms_in_{equal}": alarms,
            }
        )
    )


if __name__ == "__main__":
    main()
