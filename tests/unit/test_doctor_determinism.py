"""Sources of nondeterminism: each can be active and not, what is refused, and what the command prints."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm.doctor import determinism  # noqa: E402  - the seam comes first, as in a run
from megatron_slm.doctor.sources import KINDS, PROGRAM, State, Target  # noqa: E402

EXPERTS = ("model.num_moe_experts=4",)
HELD = ("train.deterministic=true",)
SWITCHES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
    "OMP_NUM_THREADS": "2",
}
CORE_OPTIONS = {
    "fused weight gradient": "gradient_accumulation_fusion",
    "fused cross entropy": "cross_entropy_loss_fusion",
    "tp overlap by user buffers": "tp_comm_overlap",
    "fused permutation of tokens": "moe_permute_fusion",
    "overlap of shared experts": "moe_shared_expert_overlap",
}
Changed = Mapping[str, Any]


def job(
    where: str,
    *overrides: str,
    environment: Mapping[str, str] | None = None,
    world_size: int = 4,
    engine: bool = False,
    core: Changed | None = None,
) -> Target:
    """A job of the tiny model; ``core`` holds what is changed in core's configuration afterwards."""
    target = determinism.target_of(
        load(None, ["name=x", *overrides]).config, where, world_size, environment if environment is not None else {}
    )
    changed = copy.copy(target.core)
    for name, value in (core or {}).items():
        setattr(changed, name, value)
    return replace(target, core=changed, transformer_engine=engine)


def source(target: Target, name: str) -> determinism.Source:
    return next(one for one in determinism.sources(target) if one.name == name)


# Name of the source -> jobs in which it is active, fixed and inactive; a kind of job is there at least.
CASES: dict[str, dict[str, list[Target]]] = {
    "embedding gradient": {
        "active": [job("cuda"), job("cpu", environment={"OMP_NUM_THREADS": "2"}, core={"deterministic_mode": True})],
        "fixed": [job("cuda", *HELD), job("cpu", *HELD, core={"deterministic_mode": True})],
        "inactive": [job("cpu"), job("cpu", environment={"OMP_NUM_THREADS": "1"}, core={"deterministic_mode": True})],
    },
    "tokens back from experts": {
        "active": [job("cuda", *EXPERTS)],
        "fixed": [job("cuda", *EXPERTS, *HELD)],
        "inactive": [job("cuda"), job("cpu", *EXPERTS)],
    },
    "routing map": {
        "active": [job("cuda", *EXPERTS)],
        "fixed": [job("cuda", *EXPERTS, *HELD)],
        "inactive": [job("cuda"), job("cpu", *EXPERTS)],
    },
    "ties in the router": {
        "active": [
            job("cpu", *EXPERTS, core={"moe_router_dtype": None}),
            job("cuda", *EXPERTS, *HELD, core={"moe_input_jitter_eps": 0.01}),
        ],
        "fixed": [job("cuda", *EXPERTS), job("cpu", *EXPERTS)],
        "inactive": [job("cuda")],
    },
    "attention gradient": {
        "active": [
            job("cuda"),
            job("cuda", *HELD, engine=True),
            job("cuda", engine=True, environment={"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}),
            job("cuda", "data.reset_attention_mask=true", engine=True, environment=SWITCHES),
        ],
        "fixed": [job("cuda", *HELD), job("cuda", engine=True, environment=SWITCHES)],
        "inactive": [job("cpu")],
    },
    "matrix products": {
        "active": [job("cuda"), job("cuda", environment={"CUBLAS_WORKSPACE_CONFIG": ":0:0"})],
        "fixed": [job("cuda", environment=SWITCHES)],
        "inactive": [job("cpu")],
    },
    "order of reductions": {
        "active": [job("cuda"), job("cuda", environment={"NCCL_ALGO": "Tree"})],
        "fixed": [job("cuda", environment=SWITCHES)],
        "inactive": [job("cuda", world_size=1), job("cpu"), job("cuda", "parallel.distributed_backend=gloo")],
    },
    "compiled fusions": {
        "active": [job("cuda"), job("cuda", environment={"TORCHINDUCTOR_DETERMINISTIC": "0"})],
        "fixed": [job("cuda", environment=SWITCHES)],
        "inactive": [job("cpu")],
    },
    "compute threads": {
        "active": [job("cpu", environment={"OMP_NUM_THREADS": text}) for text in ("", "0", "4,2")] + [job("cpu")],
        "fixed": [job("cpu", environment=SWITCHES)],
        "inactive": [job("cuda")],
    },
    **{
        name: {"active": [job("cuda", *HELD, core={option: True})], "fixed": [], "inactive": [job("cuda"), job("cpu")]}
        for name, option in CORE_OPTIONS.items()
    },
}


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_every_source_can_be_active_and_not(name: str) -> None:
    for state, targets in CASES[name].items():
        assert targets or state == "fixed"
        for target in targets:
            found = source(target, name)
            assert found.state == state, found
            assert bool(found.switch) == (state == "active") and found.reason


def test_every_place_in_core_is_there() -> None:
    spec = util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    words = {
        "embedding gradient": "if self.deterministic_mode:",
        "tokens back from experts": "are_deterministic_algorithms_enabled",
        "routing map": "are_deterministic_algorithms_enabled",
        "ties in the router": "torch.topk",
        "attention gradient": "deterministic_mode",
        "order of reductions": "def start_grad_sync",
        "compiled fusions": "def enable_jit_fuser",
        "fused weight gradient": "gradient_accumulation_fusion",
        "fused cross entropy": "cross_entropy_loss_fusion",
        "tp overlap by user buffers": "tp_comm_overlap",
        "fused permutation of tokens": "fused_permute",
        "overlap of shared experts": "moe_shared_expert_overlap",
    }
    cited = {kind.name: kind.where for kind in KINDS if kind.where.startswith("megatron/core/")}
    assert cited.keys() == words.keys()
    for name, where in cited.items():
        path, line = where.removeprefix("megatron/core/").split(":")
        assert words[name] in (folder / path).read_text().splitlines()[int(line) - 1], where


def test_what_is_set_makes_every_source_inactive() -> None:
    """Setting the switches that are printed is enough."""
    for where, engine in (("cpu", False), ("cuda", False), ("cuda", True)):
        first = job(where, *EXPERTS, engine=engine)
        switches = {one.switch for one in determinism.active(first)}
        environment = dict(switch.split("=", 1) for switch in switches if "." not in switch.split("=")[0])
        overrides = [switch for switch in switches if "." in switch.split("=")[0]]
        assert set(overrides) <= {PROGRAM}
        settled = job(where, *EXPERTS, *overrides, environment=environment, engine=engine)
        assert determinism.active(settled) == []
        determinism.require(settled)


def test_core_is_told_on_a_gpu_alone() -> None:
    """On CPU ranks core's own switch makes the gradient of an embedding worse."""
    assert job("cuda", *HELD).core.deterministic_mode
    assert not job("cpu", *HELD).core.deterministic_mode
    assert not job("cuda").core.deterministic_mode


def test_a_refusal_names_every_source_and_what_to_set() -> None:
    with pytest.raises(ConfigError) as refused:
        determinism.require(job("cuda", *HELD, engine=True))
    for text in ("CUBLAS_WORKSPACE_CONFIG=:4096:8", "NCCL_ALGO=Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"):
        assert f"set {text}" in str(refused.value)
    assert "embedding gradient" not in str(refused.value)


def test_another_contract_is_refused_on_resume(tmp_path: Path) -> None:
    terms = determinism.contract(job("cpu", *HELD, environment=SWITCHES), "cpu")
    determinism.require_same(tmp_path, terms)  # nothing was recorded
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({"determinism": None}))
    determinism.require_same(tmp_path, terms)
    path.write_text(json.dumps({"determinism": terms}))
    determinism.require_same(tmp_path, terms)
    other = determinism.contract(job("cpu", *HELD, environment={"OMP_NUM_THREADS": "3"}, world_size=8), "cpu")
    with pytest.raises(CheckpointError) as refused:
        determinism.require_same(tmp_path, other)
    assert "  threads: 2 there, 3 now" in str(refused.value)
    assert "  layout/world_size: 4 there, 8 now" in str(refused.value)
    assert "versions" not in str(refused.value)


def test_contract_follows_what_decides_the_bits() -> None:
    plain = determinism.contract(job("cpu"), "cpu")
    for overrides in (
        ("parallel.ddp_bucket_size=1000",),
        ("parallel.overlap_grad_reduce=false",),
        ("train.micro_batch_size=2",),
        ("parallel.tensor_model_parallel_size=2",),
    ):
        assert determinism.contract(job("cpu", *overrides), "cpu") != plain
    assert determinism.contract(job("cpu", "log.log_interval=3"), "cpu") == plain
    assert {"megatron-core", "torch"} <= plain["versions"].keys()


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "determinism", "--preset", "tiny", "parallel.device=cpu", "--deterministic-mode"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^fixed +compute threads +OMP_NUM_THREADS=1$", printed, re.MULTILINE)
    assert printed.endswith("nothing is active\n") and "\n  threads: 1\n" in printed

    monkeypatch.delenv("OMP_NUM_THREADS")
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^active +compute threads .*\n +why .*\n +where .*\n +set +OMP_NUM_THREADS=1$", printed, re.M)

    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["active"] == 1 and len(found["sources"]) == len(KINDS)
    assert found["contract"]["threads"] is None and found["contract"]["layout"]["world_size"] == 1
    (one,) = (row for row in found["sources"] if row["state"] == State.ACTIVE)
    assert one["name"] == "compute threads" and one["switch"] == "OMP_NUM_THREADS=1"


def test_command_on_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "determinism", "--preset", "tiny", "parallel.device=cuda", "parallel.world_size=8"]
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert main(command) == 1
    assert f"set   {PROGRAM}" in capsys.readouterr().out
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    assert main([*command, "--deterministic"]) == 0
    assert main([*command, "train.seed=-1"]) == 2


def test_the_dry_world_plays_a_deterministic_job(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no environment of a GPU, of which core would demand a variable."""
    shape = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.vocab_size=128")
    assert main(["memory", "name=x", *shape, "train.deterministic=true", "model.seq_length=16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
