"""How the job is divided over ranks, and which exchanges overlap with compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_slm.config.option import option

_HANG_SHARE = 0.8
"""Of the time-out of a collective: before it, every rank can still say where it stands."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The degrees of every axis. Changing this section never changes the numbers beyond reassociation."""

    device: str = option(
        "auto", "where tensors live; auto is cuda when a GPU is visible", choices=("auto", "cuda", "cpu")
    )
    world_size: int | None = option(
        None,
        "ranks of the whole job; default the launcher's, or the fewest that hold the model when mslm starts the ranks",
        minimum=1,
    )
    tensor_model_parallel_size: int = option(1, "ranks that share each matrix (tp)", minimum=1)
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers (pp)", minimum=1)
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "layer chunks per pipeline rank (vpp); more than 1 is the interleaved schedule", minimum=1
    )
    context_parallel_size: int = option(1, "ranks that share each sequence (cp)", minimum=1)
    cp_comm_type: str = option(
        "p2p", "how cp ranks exchange keys and values: in a ring, or gathered at once", choices=("p2p", "all_gather")
    )
    expert_model_parallel_size: int = option(1, "ranks that share the experts (ep)", minimum=1)
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that share each expert's matrices; default tensor_model_parallel_size", minimum=1
    )
    moe_token_dispatcher_type: str = option(
        "alltoall", "how tokens reach their experts' ranks", choices=("alltoall", "allgather")
    )
    moe_grouped_gemm: bool = option(False, "all experts of a rank in one kernel; needs Transformer Engine")
    sequence_parallel: bool = option(
        False, "divide norms and dropouts over tp along the sequence; default true with experts and tp above 1"
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "count the embedding as one layer of the pipeline split"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "count the output layer and loss as one layer of the split"
    )
    use_distributed_optimizer: bool = option(True, "divide master weights and moments over data-parallel ranks")
    overlap_grad_reduce: bool = option(True, "reduce gradients bucket by bucket during the backward pass")
    overlap_param_gather: bool = option(False, "gather parameters bucket by bucket during the forward pass")
    ddp_bucket_size: int | None = option(
        None, "elements of one gradient bucket; default core's max(40M, 1M x dp)", minimum=1
    )
    reduce_scatter_with_fp32_accumulation: bool = option(
        False, "sum gradients locally in fp32, in rank order: the result does not depend on the bucket layout"
    )
    distributed_backend: str | None = option(
        None, "collectives; default nccl on cuda, gloo on cpu", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(10.0, "a collective that waits longer ends the run", minimum=0.01)
    hang_timeout_minutes: float | None = option(
        None,
        "a job in which no rank has moved on for so long is ended, and who waits for whom is said; 0 switches it off; "
        "default 0.8 of distributed_timeout_minutes",
        minimum=0.0,
    )

    @property
    def hang_timeout(self) -> float:
        """Minutes without progress after which a job is ended; 0 for never."""
        if self.hang_timeout_minutes is None:
            return _HANG_SHARE * self.distributed_timeout_minutes
        return self.hang_timeout_minutes

    @property
    def expert_tp_size(self) -> int:
        """Ranks that share each expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def vpp_size(self) -> int:
        """Model chunks per pipeline rank, 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica: tp x pp x cp."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def smallest_world_size(self) -> int:
        """The fewest ranks of this division: whole model replicas, and whole sets of experts (etp x ep x pp)."""
        experts = self.expert_tp_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        return math.lcm(self.model_parallel_size, experts)
