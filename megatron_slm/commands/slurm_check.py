"""Whether a job can start and fit, on a login node without a GPU: the verbs ``check --deep`` and ``memory``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence

from megatron_slm.commands import memory, training
from megatron_slm.commands.command import EXIT_OK, EXIT_REFUSED, violations_of
from megatron_slm.commands.slurm_job import Job, budget_left, make
from megatron_slm.errors import ConfigError
from megatron_slm.launch.allocation import Allocation

GPU_VARIABLE = "MSLM_GPU"
_MIB = 1 << 20
PROCESS_MIB = 450
"""Of a CPU rank before its first tensor: the interpreter with torch and core. 4 ranks of a tiny model, by their RSS."""


def refusal(jobs: Sequence[Job], own: Allocation) -> int:
    """0 if the jobs can start and fit, else 2, having said on standard error why not.

    The rules are checked for every job; the ranks are played and the bytes counted for the first.

    Raises:
        ConfigError: the configuration and the allocation contradict each other.
    """
    for job in jobs:
        found = [*_contradictions(job, own), *violations_of(job.resolved, own.world_size, files=True)]
        if found:
            raise ConfigError("\n".join([f"{job.name} cannot start:", *found]))
        make(job.directory.parent)
        budget_left(job.directory, own.nodes, os.environ)
    tokens = _tokens(jobs[0], own)
    with contextlib.redirect_stdout(sys.stderr):
        if code := training.check("check", [*tokens, "--deep"]):
            return code
    return _memory_of_gpus(tokens, own) if own.gpus_per_node else _memory_of_nodes(tokens, own)


def _contradictions(job: Job, own: Allocation) -> list[str]:
    parallel = job.resolved.config.parallel
    found = []
    if parallel.world_size not in (None, own.world_size):
        found.append(
            f"parallel.world_size = {parallel.world_size}, but {own.nodes} nodes of {own.ranks_per_node} ranks are "
            f"{own.world_size}. Change --nodes and --ntasks-per-node, or leave the key out."
        )
    if parallel.device == "cuda" and not own.gpus_per_node:
        found.append("parallel.device = cuda, but the job asks for no GPU: give --gpus-per-node.")
    return found


def _tokens(job: Job, own: Allocation) -> list[str]:
    on_cpu = {} if own.gpus_per_node else {"parallel__device": "cpu"}
    return job.tokens(parallel__world_size=str(own.world_size), **on_cpu)


def _memory_of_gpus(tokens: Sequence[str], own: Allocation) -> int:
    from megatron_slm.plan.cluster import ALIASES, CLUSTERS

    gpu = os.environ.get(GPU_VARIABLE) or own.gpu
    if gpu is None or (ALIASES.get(gpu, gpu) not in CLUSTERS and GPU_VARIABLE not in os.environ):
        known = ", ".join([*CLUSTERS, *ALIASES])
        print(f"note: {GPU_VARIABLE} names no GPU ({known}), so that nothing says whether it fits.", file=sys.stderr)
        return EXIT_OK
    with contextlib.redirect_stdout(sys.stderr):
        if memory.memory("memory", [*tokens, "--gpu", gpu]) == EXIT_OK:
            return EXIT_OK
    print(f"mslm: it does not fit into a {gpu}; mslm memory --gpu {gpu} --fit says what would help.", file=sys.stderr)
    return EXIT_REFUSED


def _memory_of_nodes(tokens: Sequence[str], own: Allocation) -> int:
    """CPU ranks: the largest rank, as often as there are ranks on a node."""
    if own.memory_mb is None:
        print("note: Slurm does not say how much memory a node has, so that nothing says if it fits.", file=sys.stderr)
        return EXIT_OK
    with contextlib.redirect_stdout(io.StringIO()) as written:
        memory.memory("memory", [*tokens, "--cpu", "--json"])
    largest = max(rank["total_bytes"] for rank in json.loads(written.getvalue())["ranks"])
    needed = own.ranks_per_node * (largest / _MIB + PROCESS_MIB)
    said = (
        f"{own.ranks_per_node} ranks of {largest / _MIB:,.0f} MiB and {PROCESS_MIB} MiB of program need {needed:,.0f}"
    )
    if needed <= own.memory_mb:
        print(f"fits: {said} of {own.memory_mb:,} MiB on every node", file=sys.stderr)
        return EXIT_OK
    print(
        f"mslm: it does not fit: {said} MiB, and a node has {own.memory_mb:,} MiB. More nodes, fewer ranks on each, or "
        "a larger --mem; mslm memory --cpu --fit says what would help.",
        file=sys.stderr,
    )
    return EXIT_REFUSED
