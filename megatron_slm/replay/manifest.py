"""``replay/manifest_*.json``: everything beside the tensors that decides, or may decide, what a run computes.

One file for the run and one for each rank, each named by the step at which the run was started: a resume on another
machine, with another version or other threads, leaves its own beside the first. Nothing is exchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import CheckpointError
from megatron_slm.kernels.row_products import choose
from megatron_slm.parallel.layout import AXES, Layout, layer_split
from megatron_slm.replay.source import code
from megatron_slm.replay.stream import Phase
from megatron_slm.train.optimizer_state import named_parameters
from megatron_slm.train.run_directory import cpu_name, surroundings

VERSION = 1
ENVIRONMENT = (
    "CUBLAS_", "CUDA_", "DNNL_", "FLASH_", "GLOO_", "GOMP_", "KMP_", "MALLOC_", "MKL_", "NCCL_", "NVTE_", "OMP_",
    "ONEDNN_", "OPENBLAS_", "PYTHONHASHSEED", "PYTORCH_", "TORCH", "TRITON_", "UB_",
)  # fmt: skip
"""Beginnings of the names of variables that are recorded; no other variable is, for it may be a secret."""


def run_manifest(resolved: Resolved, data: Mapping[str, Any], layout: Layout, *, step: int) -> dict[str, Any]:
    """What is the same on every rank: code, versions, configuration, data, and which rank is where."""
    return {
        "version": VERSION,
        "step": step,
        "code": code(),
        "surroundings": surroundings(),
        "config": asdict(resolved.config),
        "provenance": resolved.provenance_record(),
        "data": dict(data),
        "world_size": layout.world_size,
        "layout": layout.sizes,
        "groups": {axis: [list(group) for group in layout.groups_of(axis)] for axis in AXES},
        "schedule": schedule(resolved.config, layout),
        "phases": {phase.name: int(phase) for phase in Phase},
    }


def rank_manifest(chunks: Sequence[Any], device: torch.device, *, rank: int, step: int) -> dict[str, Any]:
    """What each rank has for itself: machine, threads, switches, environment, gradient buckets."""
    on_gpu = device.type == "cuda"
    return {
        "version": VERSION,
        "step": step,
        "rank": rank,
        "host": platform.node(),
        "slot": int(os.environ.get("MSLM_SLOT", rank)),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "libraries": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
            "nccl": torch.cuda.nccl.version() if on_gpu else None,
            "driver": torch._C._cuda_getDriverVersion() if on_gpu else None,  # type: ignore[attr-defined]
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "build": _sha256(torch.__config__.show().encode()),
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "switches": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
        },
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "buckets": buckets(chunks),
        "fingerprints": choose(device.type)[1],
    }


def schedule(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """What passes through which stage in a step: where it begins, for a batch may grow."""
    parallel = config.parallel
    return {
        "layers": [list(chunks) for chunks in layer_split(config.model.num_layers, parallel)],
        "virtual_pipeline": layout.vpp_size,
        "micro_batches": layout.num_microbatches(config.train.global_batch_size, config.train.micro_batch_size),
        "micro_batch_size": config.train.micro_batch_size,
    }


def buckets(chunks: Sequence[Any]) -> list[list[list[str]]]:
    """Names of the parameters of every bucket, by chunk: the order in which gradients are added over ranks."""
    names = {param: name for name, param in named_parameters(list(chunks))}
    return [
        [
            [names[param] for param in bucket.params_list]
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
            for bucket in group.buckets
        ]
        for chunk in chunks
    ]


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace a manifest in one rename.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}); make room there, or set replay.level=none"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
