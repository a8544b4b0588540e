"""``mslm doctor determinism`` and ``train.deterministic``: what can differ from run to run, and what must be equal.

``device.preload`` comes before this is imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_slm.config.run_config import RunConfig
from megatron_slm.doctor.sources import KINDS, State, Target
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.model.core_config import transformer_config
from megatron_slm.parallel.layout import Layout
from megatron_slm.train.run_directory import surroundings

NUMERIC_PACKAGES = ("megatron-slm", "megatron-core", "torch", "numpy", "transformer-engine")
VARIABLES = ("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_", "KMP_DYNAMIC", "MKL_", "NCCL_ALGO",
    "NCCL_BUFFSIZE", "NCCL_COLLNET_ENABLE", "NCCL_MAX_", "NCCL_MIN_", "NCCL_NTHREADS", "NCCL_NVLS_ENABLE",
    "NCCL_PROTO", "NCCL_TOPO_FILE", "NVTE_", "OMP_DYNAMIC", "ONEDNN_",
    "TORCHINDUCTOR_DETERMINISTIC", "TORCH_ALLOW_TF32", "TORCH_BLAS_PREFER", "UB_")  # fmt: skip
"""Beginnings of the names of variables that choose kernels, threads or the order of exchanges."""
SCHEDULE = ("train.micro_batch_size", "train.global_batch_size", "train.rampup_batch_size",
    "train.recompute_granularity", "train.recompute_method", "train.recompute_num_layers", "train.recompute_modules",
    "parallel.virtual_pipeline_model_parallel_size", "parallel.account_for_embedding_in_pipeline_split",
    "parallel.account_for_loss_in_pipeline_split", "parallel.sequence_parallel", "parallel.cp_comm_type",
    "parallel.moe_token_dispatcher_type", "parallel.moe_grouped_gemm")  # fmt: skip
BUCKETS = ("parallel.ddp_bucket_size", "parallel.overlap_grad_reduce", "parallel.use_distributed_optimizer",
    "parallel.reduce_scatter_with_fp32_accumulation",
    "precision.accumulate_allreduce_grads_in_fp32")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One source of nondeterminism in one job."""

    name: str
    state: str
    reason: str
    switch: str
    """What to set, as it is typed (``key=value`` or a variable); empty where there is nothing to set."""
    why: str
    where: str


def target_of(config: RunConfig, device: str, world_size: int, environment: Mapping[str, str]) -> Target:
    """A job as its ranks would build it; ``environment`` are the variables they would have."""
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device=device)
    engine = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    return Target(config, device, world_size, core, environment, engine)


def sources(target: Target) -> list[Source]:
    """Every source, in a fixed order."""
    found = []
    for kind in KINDS:
        verdict = kind.judge(target)
        found.append(
            Source(kind.name, verdict.state.value, verdict.reason, verdict.switch, why=kind.why, where=kind.where)
        )
    return found


def active(target: Target) -> list[Source]:
    """Those that are active."""
    return [source for source in sources(target) if source.state == State.ACTIVE]


def contract(target: Target, device_name: str) -> dict[str, Any]:
    """What must be equal for two runs to be equal to the last bit, beside code, model, data and seed."""
    config = target.config
    environment = {name: target.environment[name] for name in sorted(target.environment) if name.startswith(VARIABLES)}
    versions = {name: version for name, version in surroundings()["versions"].items() if name in NUMERIC_PACKAGES}
    return {
        "threads": target.threads,
        "device": device_name,
        "backend": target.backend,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {**versions, "cuda": torch.version.cuda},
        "environment": environment,
        "layout": {"world_size": target.world_size, **Layout.from_config(config.parallel, target.world_size).sizes},
        "schedule": {key: _value(config, key) for key in SCHEDULE},
        "buckets": {key: _value(config, key) for key in BUCKETS},
    }


def require(target: Target) -> None:
    """Refuse a job in which any source is active.

    Raises:
        ConfigError: names each with its switch.
    """
    if found := active(target):
        lines = [f"  {source.name}: {source.reason}; set {source.switch}" for source in found]
        raise ConfigError(
            "\n".join(
                [
                    "train.deterministic = true, but these sources of nondeterminism are active:",
                    *lines,
                    "Set all of them before the job is started, or train.deterministic=false.",
                ]
            )
        )


def hold(target: Target) -> None:
    """Make this rank deterministic, before it builds anything; for the whole life of the process.

    Raises:
        ConfigError: a source stays active.
    """
    require(target)
    torch.use_deterministic_algorithms(True)
    if target.device == "cpu" and target.threads is not None:
        torch.set_num_threads(target.threads)


def require_same(run: Path, own: Mapping[str, Any]) -> None:
    """Refuse to resume a deterministic run under another contract. A run that was not deterministic has none.

    Args:
        run: the run's directory; its ``environment.json`` keeps the contract under ``determinism``.
        own: the contract of the job that would go on.

    Raises:
        CheckpointError: names everything that differs.
    """
    try:
        known = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("determinism")
    except (OSError, ValueError, AttributeError):
        return
    if known is None:
        return
    there, now = _flat(known), _flat(json.loads(json.dumps(own)))
    lines = [
        f"  {key}: {json.dumps(there.get(key))} there, {json.dumps(now.get(key))} now"
        for key in sorted({*there, *now})
        if there.get(key) != now.get(key)
    ]
    if lines:
        raise CheckpointError(
            "\n".join(
                [
                    f"train.deterministic = true, but {run} was trained in circumstances that give other bits:",
                    *lines,
                    "Restore them, set train.deterministic=false to go on all the same, or --fresh to start anew.",
                ]
            )
        )


def report(target: Target, terms: Mapping[str, Any]) -> str:
    """The table that is printed: active sources with what to set, then the others, then the contract."""
    found = sources(target)
    width = max(len(source.name) for source in found)
    lines = [f"{target.config.name}: {target.world_size} x {target.device}, {target.backend}"]
    for source in sorted(found, key=lambda one: list(State).index(State(one.state))):
        lines.append(f"{source.state:<8}  {source.name:<{width}}  {source.reason}")
        if source.state == State.ACTIVE:
            lines += [f"{'':<10}{label:<5} {text}" for label, text in _details(source)]
    lines.append("what must be equal for bits to be equal, beside code, model, data and seed:")
    lines += [f"  {key}: {json.dumps(value)}" for key, value in _flat(terms).items()]
    number = len([source for source in found if source.state == State.ACTIVE])
    return "\n".join([*lines, f"{number} active" if number else "nothing is active"])


def to_json(target: Target, terms: Mapping[str, Any]) -> str:
    """The same for programs: ``sources`` with every field, ``contract``, and ``active``, their number."""
    found = [vars(source) for source in sources(target)]
    number = len([source for source in found if source["state"] == State.ACTIVE])
    return json.dumps({"active": number, "sources": found, "contract": terms}, indent=1)


def _details(source: Source) -> tuple[tuple[str, str], ...]:
    return ("why", source.why), ("where", source.where), ("set", source.switch)


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under one name each."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat.update(_flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
