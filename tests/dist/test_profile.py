"""Real profiles of real runs: what is in them, what the report makes of them, and that they change no number."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.profile import names
from megatron_slm.profile.analyse import OUTSIDE, Spent
from megatron_slm.profile.chrome import read_chrome
from megatron_slm.profile.compare import Report, report_of, traces_of
from tests import runs
from tests.breadth import widely

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "train.micro_batch_size=2",
    "train.train_iters=3",
    "train.eval_iters=0",
)
MICRO_BATCHES, LAYERS_OF_STAGE = 4, 2
MESSAGE_BYTES = 32 * 2 * 32 * 4
"""Hidden states of a micro-batch: [S, B, H] of fp32."""
SLOW_RANK, SLEEP_S = 1, 0.1


def slow_rank() -> None:
    """On one rank every MLP's forward pass sleeps; planted before the rank knows which one it is."""
    import torch.distributed as dist
    from megatron.core.transformer.mlp import MLP

    forward = MLP.forward

    @functools.wraps(forward)
    def sleeping(self: Any, *arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == SLOW_RANK:
            time.sleep(SLEEP_S)
        return forward(self, *arguments, **options)

    MLP.forward = sleeping


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """TP2 x PP2, steps 2 and 3 of every rank, with one slow rank."""
    run = tmp_path_factory.mktemp("runs") / "profiled"
    own = ("profile.profile_steps=2:3", "profile.profile_ranks=all")
    assert runs.train(run, data, 4, *LAYOUT, *own, plant=slow_rank) == 0
    return run


@pytest.fixture(scope="module")
def report(profiled: Path) -> Report:
    return report_of(traces_of([profiled]), gaps=1000)


def test_a_profiled_run_computes_the_same_bits(profiled: Path, data: Path) -> None:
    plain = profiled.parent / "plain"
    assert runs.train(plain, data, 4, *LAYOUT) == 0
    assert len(runs.losses(plain)) == 3 and runs.losses(plain) == runs.losses(profiled)
    ends = [runs.contents(runs.checkpoint_path(run, 3)) for run in (plain, profiled)]
    assert runs.differences(*ends) == []


def test_phases_make_up_the_steps(profiled: Path, report: Report) -> None:
    """Against the trace itself: what the events of steps and phases last."""
    for rank in report.ranks:
        events = json.loads(gzip.decompress((profiled / "profile" / f"rank-{rank.rank}.json.gz").read_bytes()))
        lasted: Counter[str] = Counter()
        for event in events["traceEvents"]:
            if event.get("cat") == "user_annotation":
                lasted[event["name"]] += event["dur"] * 1000
        steps = lasted["step: 2"] + lasted["step: 3"]
        assert set(rank.steps_ns) == {"2", "3"} and rank.spent.wall_ns == pytest.approx(steps, abs=10)
        assert sum(spent.wall_ns for spent in rank.phases.values()) == rank.spent.wall_ns
        for phase in (names.DATA, names.JUDGED, names.OPTIMIZER):
            assert rank.phases[phase].wall_ns == pytest.approx(lasted[f"phase: {phase}"], rel=0.01)
        assert rank.phases.get(OUTSIDE, Spent()).wall_ns < 0.1 * steps
        both = [rank.phases[phase].wall_ns for phase in (names.FORWARD_BACKWARD, names.REDUCTION)]
        assert sum(both) == pytest.approx(lasted[f"phase: {names.FORWARD_BACKWARD}"], rel=0.01)
        for table in (rank.phases, rank.modules):
            assert sum(spent.compute_ns for spent in table.values()) == rank.spent.compute_ns
            assert sum(spent.exposed_ns for spent in table.values()) == rank.spent.exposed_ns


def test_every_exchange_is_counted_with_its_axis_and_bytes(report: Report) -> None:
    """A tensor-parallel layer all-reduces twice in each direction; a stage boundary is crossed once in each."""
    rows = {one.rank: {(row.axis, row.operation): row for row in one.axes} for one in report.ranks}
    passes = 2 * MICRO_BATCHES
    first = passes * (1 + 4 * LAYERS_OF_STAGE)
    """The embedding's, and those of the layers."""
    for rank in (0, 1):
        assert (rows[rank]["tp", "all_reduce"].calls, rows[rank]["tp", "all_reduce"].size_bytes) == (
            first,
            first * MESSAGE_BYTES,
        )
    for rank in range(4):
        for operation in ("send", "recv"):
            row = rows[rank]["pp", operation]
            assert (row.calls, row.size_bytes) == (passes, passes * MESSAGE_BYTES)
        assert {axis for axis, _ in rows[rank]} <= {"tp", "pp", "dp", "tp-pp", "embd", "world"}


def test_micro_batches_and_modules_have_their_ranges(profiled: Path) -> None:
    for rank, layers in ((0, (0, 1)), (3, (2, 3))):
        trace = read_chrome(profiled / "profile" / f"rank-{rank}.json.gz")
        found = Counter((one.kind, one.name) for one in trace.ranges)
        for direction in ("forward", "backward"):
            for number in range(MICRO_BATCHES):
                assert found[names.MICRO_BATCH, f"{number} {direction}"] == 2
            for layer in layers:
                for part in ("", ".self_attention", ".mlp", ".input_layernorm", ".self_attention.core_attention"):
                    assert found[names.MODULE, f"decoder.layers.{layer}{part} {direction}"] == 2 * MICRO_BATCHES
        assert found[names.MODULE, "output_layer backward"] == (2 * MICRO_BATCHES if rank == 3 else 0)
        assert found[names.MODULE, "embedding backward"] == (2 * MICRO_BATCHES if rank == 0 else 0)
        assert found[names.STEP, "2"] == found[names.STEP, "3"] == 1
        inside = [one for one in trace.ranges if one.kind == names.MICRO_BATCH]
        for one in trace.ranges:
            if one.kind == names.MODULE:
                assert any(outer.start <= one.start and one.end <= outer.end for outer in inside), one


def test_the_slow_rank_is_named_and_the_others_wait(report: Report) -> None:
    planted = LAYERS_OF_STAGE * MICRO_BATCHES * SLEEP_S * 1e9
    found = report.slowest
    assert found is not None and found.rank == SLOW_RANK
    assert found.where == "decoder.layers.*.mlp forward" and found.more_ns > 0.5 * planted
    waiting = {one.rank: one.spent.exposed_ns for one in report.ranks}
    assert min(waiting, key=waiting.__getitem__) == SLOW_RANK
    beside = waiting[SLOW_RANK - 1] - waiting[SLOW_RANK]
    assert beside > 0.8 * 2 * planted, "its tp peer waits in every layer for both steps"
    gaps = next(one for one in report.ranks if one.rank == SLOW_RANK).gaps
    slept = [one for one in gaps if one.length_ns > SLEEP_S * 1e9 and one.module.endswith("mlp forward")]
    assert len(slept) == 2 * LAYERS_OF_STAGE * MICRO_BATCHES


def mslm(*tokens: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **variables}
    command = [sys.executable, "-m", "megatron_slm.cli", *tokens]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_the_verb_profiles_a_run_of_its_own(tmp_path: Path, data: Path) -> None:
    """With recomputed layers, and every allocation."""
    recompute = ("granularity=full", "method=uniform", "num_layers=1")
    own = ("train.train_iters=50", *(f"train.recompute_{one}" for one in recompute))
    given = runs.given(tmp_path / "run", data, *own)
    ended = mslm("profile", *given, "--steps", "2", "--with", "torch,memory")
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "run-profile"
    assert not (tmp_path / "run").exists() and not list(run.glob("checkpoints/*")), "nothing but the profile"
    assert "USDT" not in ended.stderr, "kineto is silent"
    assert [record["step"] for record in runs.records(run)] == [1, 2], "it ends with the last profiled step"
    trace = read_chrome(run / "profile" / "rank-0.json.gz")
    found = Counter(one.name for one in trace.ranges if one.kind == names.MODULE)
    recomputed = [name for name in found if name.endswith(names.RECOMPUTED)]
    assert found["decoder.layers.3.mlp recomputed"] == found["decoder.layers.3.mlp forward"] == 8, recomputed
    events = json.loads(gzip.decompress((run / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    assert any(event["name"] == "[memory]" for event in events)

    tables = mslm("profile", "report", str(run))
    assert tables.returncode == 0 and "decoder.layers.*.mlp recomputed" in tables.stdout
    tool = [sys.executable, str(ROOT / "tools" / "nsight_report.py"), str(run / "profile" / "rank-0.json.gz")]
    again = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert again.stdout == tables.stdout, again.stderr


def _nvtx_headers() -> Path | None:
    """Where <nvtx3/nvToolsExt.h> lies: of the toolkit, or of the package nvidia-nvtx."""
    places = [Path("/usr/local/cuda/include"), *sorted(Path("/usr/local").glob("cuda-*/include"))]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        places += Path(place).glob("*/include")
    return next((place for place in places if (place / "nvtx3" / "nvToolsExt.h").is_file()), None)


@pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc, which builds the library that listens to NVTX, is missing"
)
@pytest.mark.skipif(importlib.util.find_spec("nvtx") is None, reason="the package nvtx is not installed")
@pytest.mark.skipif(_nvtx_headers() is None, reason="nvToolsExt.h is missing: install nvidia-nvtx, or the CUDA toolkit")
def test_nvtx_ranges_arrive_at_a_tool_that_listens(tmp_path: Path, data: Path) -> None:
    """The way Nsight Systems hears them: by a library that is injected into the process."""
    library = tmp_path / "nvtx_log.so"
    source = ROOT / "tests" / "fixtures" / "nvtx_log.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-I", str(_nvtx_headers()), source, "-o", library, "-ldl"], check=True)
    given = runs.given(tmp_path / "run", data, "train.train_iters=5", "parallel.tensor_model_parallel_size=2")
    listening = {"NVTX_INJECTION64_PATH": str(library), "NVTX_LOG": str(tmp_path / "heard")}
    ended = mslm("profile", *given, "--steps", "2", "--ranks", "1", "--with", "nsys-capture", **listening)
    assert ended.returncode == 0, ended.stderr
    (heard,) = tmp_path.glob("heard.*")
    open_ranges: list[str] = []
    started: dict[str, str] = {}
    inside = set()
    for line in heard.read_text().splitlines():
        verb, _, rest = line.partition(" ")
        if verb == "push":
            inside.add(" > ".join([*open_ranges, rest][-2:]))
            open_ranges.append(rest)
        elif verb == "pop":
            open_ranges.pop()
        elif verb == "start":
            number, _, text = rest.partition(" ")
            started[number] = text
            inside.add(" > ".join([*open_ranges, text][-2:]))
        else:
            started.pop(rest)
    assert not open_ranges and not started, "every range ends"
    for expected in (
        "rank: 1 of 2",
        "step: 2 > phase: data",
        "phase: forward and backward > micro-batch: 7 forward",
        "decoder.layers.3 forward > module: decoder.layers.3.mlp forward",
        "phase: forward and backward > module: decoder.layers.0.mlp backward",
        "module: embedding forward > collective: all_reduce tp 4096 bytes",
        "step: 2 > phase: optimizer",
    ):
        assert any(expected in one for one in inside), (expected, sorted(inside))


def test_without_nvtx_every_rank_refuses_in_one_sentence(tmp_path: Path, data: Path) -> None:
    if importlib.util.find_spec("nvtx") is not None:
        pytest.skip("the package nvtx is installed")
    given = runs.given(tmp_path / "run", data, "train.train_iters=5")
    ended = mslm("profile", *given, "--steps", "2", "--with", "nsys-capture")
    assert ended.returncode == 2 and "pip install nvtx" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("launcher", widely(["torchrun", "mpirun"], "mpirun"))
def test_the_wrapper_of_nsight_runs_under_every_launcher(tmp_path: Path, launcher: str) -> None:
    """With a stub named nsys on PATH, because no real one was at hand: it says which rank has asked."""
    stub = tmp_path / "nsys"
    stub.write_text('#!/bin/sh\necho "nsys $2 for ${RANK:-$PMI_RANK}"\n')
    stub.chmod(0o755)
    python = Path(sys.executable)
    launchers = {
        "torchrun": [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
        "mpirun": [python.parent / "mpirun", "-n", "2"],
    }
    command = [*launchers[launcher], ROOT / "launch" / "nsight.sh", "--ranks", "1", "--out", tmp_path, "echo", "bare"]
    variables = {name: value for name, value in os.environ.items() if "RANK" not in name}
    variables["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split("\n")) == ["", "bare", f"nsys --output={tmp_path}/rank-1 for 1"]
