"""Who holds what, as arithmetic: degrees -> coordinates of a rank -> rank lists, and layers -> pipeline chunks.

Everything here is a pure function of a few integers; nothing imports torch, so that a layout of 16,384 ranks can be
checked on a login node. The order of the axes is megatron-core 0.16.1's default, ``tp-cp-ep-dp-pp``: neighbouring
ranks share a tensor-parallel group, pipeline stages are farthest apart (``parallel_state.RankGenerator``).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.config import ParallelConfig

AXES = ("tp", "cp", "dp", "pp")
"""The axes of dense parameters, the fastest-varying first."""

EXPERT_AXES = ("etp", "ep", "edp", "pp")
"""The axes of expert parameters over the same ranks, the fastest-varying first (core's second ``RankGenerator``)."""


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank on every axis, each counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """The degrees of a job of ``world_size`` ranks.

    Raises:
        ConfigError: a degree is below 1, or the degrees do not divide the world.
    """

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigError(f"{field.name} is {value}, but it must be at least 1.")
        if self.world_size % self.model_parallel_size:
            raise ConfigError(
                f"world_size {self.world_size} is not a multiple of one model replica: {self._degrees()} = "
                f"{self.model_parallel_size} ranks. "
                f"{nearest_multiples('world_size', self.world_size, self.model_parallel_size)}"
            )
        if self.vpp_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size {self.vpp_size} needs pipeline_model_parallel_size of at least "
                "2, but it is 1. Raise the latter or leave the former out."
            )
        if self.world_size % self.expert_replica_size:
            raise ConfigError(
                f"world_size {self.world_size} is not a multiple of one set of experts: expert_tensor_parallel_size "
                f"{self.expert_tp_size} x expert_model_parallel_size {self.expert_model_parallel_size} x "
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size} = {self.expert_replica_size} ranks. "
                f"{nearest_multiples('world_size', self.world_size, self.expert_replica_size)}"
            )

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The layout that a ``parallel`` section describes on ``world_size`` ranks."""
        return cls(
            world_size=world_size,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica: tp x pp x cp."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Model replicas (dp), each of which reads other samples."""
        return self.world_size // self.model_parallel_size

    @property
    def expert_tp_size(self) -> int:
        """Ranks that share each expert's matrices (etp)."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_replica_size(self) -> int:
        """Ranks that hold every expert of every layer once: etp x ep x pp."""
        return self.expert_tp_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def communicators(self) -> int:
        """NCCL communicators that a rank opens: one for each group of more than one rank that exchanges."""
        ep = self.expert_model_parallel_size
        sizes = [
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.data_parallel_size * self.context_parallel_size,
            self.pipeline_model_parallel_size,
            self.world_size,
            *((ep, self.expert_tp_size * ep, self.expert_sizes["edp"]) if ep > 1 else ()),
        ]
        return sum(size > 1 for size in sizes)

    @property
    def vpp_size(self) -> int:
        """Model chunks per pipeline rank, 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def sizes(self) -> dict[str, int]:
        """Degree of every axis in :data:`AXES`, the fastest-varying first."""
        return {
            "tp": self.tensor_model_parallel_size,
            "cp": self.context_parallel_size,
            "dp": self.data_parallel_size,
            "pp": self.pipeline_model_parallel_size,
        }

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Degree of every axis in :data:`EXPERT_AXES`, the fastest-varying first."""
        return {
            "etp": self.expert_tp_size,
            "ep": self.expert_model_parallel_size,
            "edp": self.world_size // self.expert_replica_size,
            "pp": self.pipeline_model_parallel_size,
        }

    def coordinates(self, rank: int) -> Coordinates:
        """Position of global ``rank`` on every axis.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} does not exist: the ranks are 0 to {self.world_size - 1}.")
        position = {}
        for axis, size in self.sizes.items():
            rank, position[axis] = divmod(rank, size)
        return Coordinates(**position)

    def rank_at(self, coordinates: Coordinates) -> int:
        """Global rank at a position; the inverse of :meth:`coordinates`."""
        rank, stride = 0, 1
        for axis, size in self.sizes.items():
            rank += getattr(coordinates, axis) * stride
            stride *= size
        return rank

    def ranks_of(self, axis: str, rank: int) -> tuple[int, ...]:
        """Global ranks, ascending, that differ from ``rank`` on ``axis`` only: its group on that axis.

        Args:
            axis: one of :data:`AXES` or of :data:`EXPERT_AXES`, or several of one of them joined by a hyphen as in
                core (``"dp-cp"``, ``"tp-pp"``, ``"etp-ep"``).
            rank: global rank, itself part of the answer.

        Raises:
            ConfigError: there is no such axis or rank.
        """
        self.coordinates(rank)
        named = set(axis.split("-"))
        sizes = self.expert_sizes if named & {*EXPERT_AXES[:3]} else self.sizes
        if unknown := named - set(sizes):
            raise ConfigError(
                f"{min(unknown)!r} is no axis of a layout; the axes are {', '.join(AXES)}, and of the experts "
                f"{', '.join(EXPERT_AXES)}."
            )
        offsets, base, stride = [], 0, 1
        for name, size in sizes.items():
            if name in named:
                offsets.append(range(0, size * stride, stride))
            else:
                base += rank // stride % size * stride
            stride *= size
        return tuple(sorted(base + sum(steps) for steps in itertools.product(*offsets)))

    def groups_of(self, axis: str) -> list[tuple[int, ...]]:
        """Every group on ``axis``, in core's order (by its lowest rank). Linear in the number of ranks."""
        groups, seen = [], bytearray(self.world_size)
        for rank in range(self.world_size):
            if not seen[rank]:
                group = self.ranks_of(axis, rank)
                groups.append(group)
                for member in group:
                    seen[member] = 1
        return groups

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches that each replica runs in one optimizer step.

        Raises:
            ConfigError: the global batch does not divide into whole micro-batches on every replica.
        """
        samples = micro_batch_size * self.data_parallel_size
        if global_batch_size % samples:
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"data-parallel size {self.data_parallel_size} = {samples}. "
                f"{nearest_multiples('global_batch_size', global_batch_size, samples)}"
            )
        return global_batch_size // samples

    def _degrees(self) -> str:
        """The product that makes one replica, in words."""
        return (
            f"tensor_model_parallel_size {self.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{self.pipeline_model_parallel_size} x context_parallel_size {self.context_parallel_size}"
        )


def nearest_multiples(name: str, value: int, divisor: int) -> str:
    """A sentence that names the multiples of ``divisor`` on both sides of ``value``."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    choices = f"{below} or {above}" if below else str(above)
    return f"Nearest valid {name}: {choices}."


def split_layers(
    num_layers: int, pp: int, vpp: int | None, *, embedding_counts: bool = False, loss_counts: bool = False
) -> list[list[int]]:
    """How many transformer layers every model chunk holds, as core's ``get_num_layers_to_build`` decides.

    Args:
        num_layers: transformer layers of the whole model.
        pp: pipeline stages.
        vpp: chunks per pipeline stage; ``None`` is 1.
        embedding_counts: the embedding takes the place of one layer in the very first chunk
            (``account_for_embedding_in_pipeline_split``).
        loss_counts: the output layer takes the place of one layer in the very last chunk
            (``account_for_loss_in_pipeline_split``).

    Returns:
        ``[pipeline rank][chunk]`` -> number of layers.

    Raises:
        ConfigError: the layers, with what is counted as one, do not divide evenly over the chunks.
    """
    chunks = vpp or 1
    if chunks > 1 and pp == 1:
        raise ConfigError(f"virtual_pipeline_model_parallel_size {chunks} needs at least 2 pipeline stages, not 1.")
    counted = num_layers + embedding_counts + loss_counts
    if counted % (pp * chunks):
        raise ConfigError(_uneven(num_layers, counted, pp, chunks))
    per_chunk = counted // (pp * chunks)
    split = [[per_chunk] * chunks for _ in range(pp)]
    split[0][0] -= embedding_counts
    split[-1][-1] -= loss_counts
    if split[0][0] < 0 or split[-1][-1] < 0:
        fewest = min(split[0][0], split[-1][-1])
        raise ConfigError(f"num_layers {num_layers} leaves a pipeline chunk with {fewest} layers. Raise num_layers.")
    return split


def layer_split(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """:func:`split_layers` of a configured pipeline."""
    return split_layers(
        num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        embedding_counts=parallel.account_for_embedding_in_pipeline_split,
        loss_counts=parallel.account_for_loss_in_pipeline_split,
    )


def chunk_layers(split: Sequence[Sequence[int]], pp_rank: int, chunk: int = 0) -> range:
    """Global indices, from 0, of the layers in one chunk, as core's ``get_transformer_layer_offset`` numbers them.

    Args:
        split: what :func:`split_layers` returned.
        pp_rank: pipeline stage that holds the chunk.
        chunk: index of the chunk on that stage; the model passes through chunk 0 of every stage, then chunk 1.
    """
    before = sum(split[stage][earlier] for earlier in range(chunk) for stage in range(len(split)))
    start = before + sum(split[stage][chunk] for stage in range(pp_rank))
    return range(start, start + split[pp_rank][chunk])


def _uneven(num_layers: int, counted: int, pp: int, chunks: int) -> str:
    """Why ``counted`` layers do not fit ``pp`` x ``chunks`` pipeline chunks, and what would."""
    extra = counted - num_layers
    layers = f"num_layers {num_layers}" + (f" + {extra} for the embedding or loss counted as a layer" if extra else "")
    total = pp * chunks
    places = f"pipeline_model_parallel_size {pp}"
    if chunks > 1:
        places += f" x virtual_pipeline_model_parallel_size {chunks} = {total}"
    reason = "there are more pipeline stages than layers" if counted < total else "the layers do not divide evenly"
    sizes = [size for size in range(1 if chunks == 1 else 2, counted + 1) if counted % (size * chunks) == 0]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - pp))[:3])
    way_out = f"Nearest valid pipeline_model_parallel_size: {', '.join(map(str, nearest))}. " if nearest else ""
    below, above = counted // total * total - extra, -(-counted // total) * total - extra
    way_out += f"Nearest valid num_layers: {f'{below} or {above}' if below > 0 else above}."
    return f"{layers} cannot be divided over {places}: {reason}. {way_out}"
