"""The variables that a job's ranks are given, each with its reason. Read off the configuration; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatron_slm.config.run_config import RunConfig


class Variable(NamedTuple):
    """A variable for every rank, and why."""

    name: str
    value: str
    reason: str


def job_variables(config: RunConfig, device: str, threads: int, environ: Mapping[str, str]) -> list[Variable]:
    """What the ranks need and nobody has set. What ``environ`` holds stays as it is.

    Args:
        device: ``cuda`` or ``cpu``.
        threads: processors of one rank.
    """
    found = [*_everywhere(threads), *(_of_gpus(config) if device == "cuda" else ())]
    return [variable for variable in found if variable.name not in environ]


def _everywhere(threads: int) -> Iterator[Variable]:
    yield Variable("OMP_NUM_THREADS", str(threads), "else every rank would start a thread for each core of the node")
    yield Variable("PYTHONUNBUFFERED", "1", "a line is in the log when it was said, also if the rank is killed next")


def _of_gpus(config: RunConfig) -> Iterator[Variable]:
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        yield Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "1",
            "kernels start in the order they were asked for: an exchange before the product that hides it (core)",
        )
    yield Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "blocks of changing size do not tear the memory to pieces; pipelines reserve less",
    )
    yield Variable("NCCL_DEBUG", "WARN", "NCCL names the link or peer that failed, and says nothing else")
    if parallel.overlap_grad_reduce or parallel.overlap_param_gather:
        for direction in ("FWD", "BWD"):
            yield Variable(
                f"NVTE_{direction}_LAYERNORM_SM_MARGIN",
                "16",
                "Transformer Engine's norms leave processors to the exchange that runs beside them",
            )
    if config.train.deterministic:
        yield from _of_deterministic_gpus()


def _of_deterministic_gpus() -> Iterator[Variable]:
    """What ``mslm doctor determinism`` would ask for (``doctor/sources.py``)."""
    yield Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS picks no kernel by the workspace that is free")
    yield Variable("NCCL_ALGO", "Ring", "NCCL adds the ranks in one order, whatever the size and topology")
    yield Variable("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", "the backward pass of attention adds without atomics")
    yield Variable("TORCHINDUCTOR_DETERMINISTIC", "1", "torch.compile keeps no candidate because it was the fastest")
