"""A job in the dry world: the ledgers of its ranks, built through the functions that build a run.

``device.preload("cpu")`` comes before this is imported.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_slm import run, run_dry_stage, run_model
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.gloo import gloo_temporary_bytes
from megatron_slm.memory.ledger import Ledger
from megatron_slm.memory.rank import RankTrace, trace_rank
from megatron_slm.memory.roles import communicators, ledgers, roles
from megatron_slm.model.core_config import transformer_config
from megatron_slm.model.ending import Ending, Scalar
from megatron_slm.parallel import declared
from megatron_slm.parallel.declared_loss import use_loss
from megatron_slm.parallel.declared_ops import GEMM_WORKSPACE_BYTES, Kernels
from megatron_slm.parallel.fp8 import require_generation
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.plan.cluster import cluster_of
from megatron_slm.plan.predict import Question, predict
from megatron_slm.plan.rates import rates_of

VOCAB_SIZE = 50_257
"""Where the configuration leaves it to the tokenizer: GPT-2's."""


def job_ledgers(
    config: RunConfig, *, gpu: str | None = None, for_gpu: bool = True, stage: int | None = None
) -> list[Ledger]:
    """The ledger of every pipeline stage.

    Args:
        config: of ``parallel.world_size`` ranks; breaks no rule.
        gpu: a cluster of ``plan.cluster``, whose GPUs' memory it is judged against.
        for_gpu: as Transformer Engine's kernels on a GPU do it; else as CPU ranks.
        stage: this pipeline stage alone.

    Raises:
        ConfigError: the GPU or the stage is not known.
    """
    world = config.parallel.world_size or config.parallel.smallest_world_size
    stages = config.parallel.pipeline_model_parallel_size
    if stage is not None and not 0 <= stage < stages:
        raise ConfigError(f"--stage {stage}: the pipeline has stages 0 to {stages - 1}.")
    surroundings = surroundings_of(config, gpu, world) if for_gpu else None
    kernels = kernels_of(config, gpu)
    wanted: Iterable[int] | None = None if stage is None else [stage]
    found = ledgers(
        config,
        partial(job_trace, config, world_size=world, for_gpu=for_gpu, kernels=kernels),
        world_size=world,
        surroundings=surroundings,
        stages=wanted,
    )
    return run_dry_stage.outside_the_step(config, found)


def kernels_of(config: RunConfig, gpu: str | None) -> Kernels:
    """Those of the GPU; of a Hopper where none is named, or of the first one that has the recipe of FP8.

    Raises:
        ConfigError: the GPU is not known, or has not got the recipe.
    """
    if gpu is None:
        return Kernels(generation="blackwell" if config.precision.fp8_recipe == "mxfp8" else "hopper")
    generation = cluster_of(gpu).architecture
    require_generation(config.precision, generation, gpu)
    return Kernels(generation=generation) if generation in GEMM_WORKSPACE_BYTES else Kernels()


def job_trace(
    config: RunConfig, rank: int, *, world_size: int, for_gpu: bool, kernels: Kernels | None = None
) -> RankTrace:
    """The trace of one rank of the job; ``device.preload("cpu")`` comes before."""
    build, vocab_size = build_declared if for_gpu else run_model.build_model, config.model.vocab_size or VOCAB_SIZE
    later = config.stage != "pretrain"
    return trace_rank(
        config,
        build,
        run.step_plan,
        rank=rank,
        world_size=world_size,
        vocab_size=vocab_size,
        kernels=partial(declared.declared_kernels, kernels or kernels_of(config, None)) if for_gpu else nullcontext,
        temporary_bytes=None if for_gpu else gloo_temporary_bytes,
        notes_saved=not for_gpu,
        beside=run_dry_stage.beside(config, build) if later else None,
        fields=run_dry_stage.fields(config, vocab_size) if later else None,
    )


def build_declared(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, ending: Ending | Scalar | None = None
) -> run_model.BuiltModel:
    """``run_model.build_model`` as a GPU with Transformer Engine builds it; inside of ``declared.declared_kernels``."""
    # Core's deterministic attention asks the environment of a GPU, and its lookup by indexing is not declared.
    train = dataclasses.replace(config.train, deterministic=False)
    core = transformer_config(config.model, config.parallel, config.precision, train, device="cuda")
    spec, norm = declared.declared_spec(config.model, run_model.packs_documents(config))
    layers = run_model.Layers(core, spec, norm, "layers: Transformer Engine's, as they are declared")
    built = run_model.assemble_model(config, groups, device, vocab_size, layers=layers, ending=ending)
    use_loss([unwrap(chunk) for chunk in built.chunks])
    return built


def surroundings_of(config: RunConfig, gpu: str | None, world_size: int) -> Surroundings:
    """What is beside torch's tensors on a GPU.

    Raises:
        ConfigError: the GPU is not known.
    """
    capacity = round(cluster_of(gpu).memory_bytes) if gpu is not None else None
    return Surroundings(capacity, communicators(config.parallel, world_size))


def stage_notes(config: RunConfig) -> list[str]:
    """What the ledgers of a stage count beside the trained model, and what they do not."""
    return run_dry_stage.notes(config)


def step_seconds(config: RunConfig, gpu: str) -> float:
    """Predicted seconds of a step on a cluster of these GPUs."""
    cluster = cluster_of(gpu)
    world = config.parallel.world_size or config.parallel.smallest_world_size
    return predict(Question(config, cluster.of_gpus(world), rates_of(cluster.architecture))).step_seconds


def deep_check(config: RunConfig, *, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Play every role of the job: what would stop it, one sentence for each role; empty where nothing does.

    A role is a pipeline stage whose layers no stage before it has, on its first rank and on its last: those differ in
    what is left of every division.

    Args:
        say: told which role is played.
    """
    world = config.parallel.world_size or config.parallel.smallest_world_size
    size = world // config.parallel.pipeline_model_parallel_size
    problems = []
    for role in roles(config, world):
        if role.like != role.pipeline_rank:
            continue
        for rank in sorted({role.rank, role.rank + size - 1}):
            say(f"rank {rank} of {world}, pipeline stage {role.pipeline_rank}")
            try:
                job_trace(config, rank, world_size=world, for_gpu=config.parallel.device != "cpu")
            except Exception as error:
                place = f"rank {rank} of {world} (pipeline stage {role.pipeline_rank})"
                problems.append(f"{place} would stop: {_shortly(error)}")
    return problems


def _shortly(error: Exception) -> str:
    """The error's first line, and the line of code that has raised it."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno}, {frame.name})"
