"""The ledgers of a job: one rank of every pipeline stage is enough, and stages that hold the same share one trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.ledger import Ledger, Row, ledger
from megatron_slm.memory.rank import RankTrace
from megatron_slm.memory.replay import replay
from megatron_slm.memory.routing import with_hot_experts
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.layout import Layout, chunk_layers, layer_split

Tracer = Callable[[int], RankTrace]
"""The trace of a rank of the world."""


class Role(NamedTuple):
    """What the ranks of one pipeline stage hold.

    Attributes:
        rank: the first of them: all others hold as much, but for the rest of a division.
        like: the pipeline stage whose trace is taken.
        shift: by how much its layers are numbered higher than those of ``like``.
    """

    pipeline_rank: int
    rank: int
    like: int
    shift: int


def roles(config: RunConfig, world_size: int) -> list[Role]:
    """One role for each pipeline stage; stages of the same layers in the same places are alike."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    held = held_layers(config)
    first: dict[object, int] = {}
    found = []
    for stage in range(stages):
        like = first.setdefault(_content(config.model, held, stage), stage)
        shift = held[stage][0].start - held[like][0].start
        found.append(Role(stage, stage * (world_size // stages), like, shift))
    return found


def held_layers(config: RunConfig) -> list[list[range]]:
    """``[pipeline stage][chunk]`` -> its layers, counted from 0."""
    split = layer_split(config.model.num_layers, config.parallel)
    return [[chunk_layers(split, stage, chunk) for chunk in range(len(split[stage]))] for stage in range(len(split))]


def ledgers(
    config: RunConfig,
    tracer: Tracer,
    *,
    world_size: int,
    surroundings: Surroundings | None = None,
    stages: Iterable[int] | None = None,
) -> list[Ledger]:
    """The ledger of every pipeline stage, or of some of them.

    Args:
        surroundings: of the device; None on a CPU.
    """
    wanted = set(stages) if stages is not None else None
    traces: dict[int, RankTrace] = {}
    found = []
    for role in roles(config, world_size):
        if wanted is not None and role.pipeline_rank not in wanted:
            continue
        if role.like not in traces:
            traces[role.like] = tracer(role.like * (world_size // config.parallel.pipeline_model_parallel_size))
        trace = replace(traces[role.like], rank=role.rank, pipeline_rank=role.pipeline_rank)
        whole = ledger(trace, replay(trace), surroundings)
        rows = with_hot_experts([_shifted(row, role.shift) for row in whole.rows], config)
        found.append(replace(whole, rows=rows))
    return found


def communicators(parallel: ParallelConfig, world_size: int) -> int:
    """NCCL communicators that a rank of the job opens (``Layout.communicators``)."""
    return Layout.from_config(parallel, world_size).communicators


def _content(model: ModelConfig, held: list[list[range]], stage: int) -> object:
    """What distinguishes a stage: the kinds of its layers, and whether it begins or ends the model."""
    kinds = tuple(tuple(model.is_moe_layer(layer) for layer in layers) for layers in held[stage])
    return kinds, stage == 0, stage == len(held) - 1


def _shifted(row: Row, shift: int) -> Row:
    """A row of the layers ``shift`` further."""
    if not shift or not row.layer.startswith("layer_"):
        return row
    number = int(row.layer.removeprefix("layer_")) + shift
    module = re.sub(r"^(decoder\.layers\.)\d+", rf"\g<1>{number}", row.module)
    return row._replace(layer=f"layer_{number}", module=module)
