"""Which axis is to blame: the job with a few of its axes and options at a time, each axis at degree 2. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_slm.config import rules
from megatron_slm.config.run_config import RunConfig
from megatron_slm.train.config import TrainConfig
from megatron_slm.verify.setting import world_size

Features = frozenset[str]

NEEDS = {"sp": ("tp",), "vpp": ("pp",)}
"""An axis or option -> what it is nothing without."""

RECOMPUTE, SHARDED, REDUCE, GATHER = (
    "recompute",
    "distributed optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
)
MOST_JOBS = 40
"""Small jobs that are tried before the search gives up."""


def features(config: RunConfig) -> list[str]:
    """Axes with more than one rank, then options that are on, in the order they are suspected."""
    parallel = config.parallel
    present = {
        "dp": world_size(config) > parallel.model_parallel_size,
        "tp": parallel.tensor_model_parallel_size > 1,
        "pp": parallel.pipeline_model_parallel_size > 1,
        "cp": parallel.context_parallel_size > 1,
        "ep": parallel.expert_model_parallel_size > 1,
        "sp": parallel.sequence_parallel,
        "vpp": parallel.vpp_size > 1,
        RECOMPUTE: config.train.recompute_granularity is not None,
        SHARDED: parallel.use_distributed_optimizer,
        REDUCE: parallel.overlap_grad_reduce,
        GATHER: parallel.overlap_param_gather,
    }
    return [name for name, there in present.items() if there]


def smallest_failing(config: RunConfig, fails: Callable[[RunConfig], bool]) -> str | None:
    """The smallest set of axes and options under which the job still fails, in words; None if none was found.

    Args:
        fails: runs a job against one rank.
    """
    for _, chosen in zip(range(MOST_JOBS), candidates(config), strict=False):
        variant = only(config, chosen)
        if variant is not None and fails(variant):
            return label(chosen)
    return None


def candidates(config: RunConfig) -> Iterator[Features]:
    """Nothing, each alone, pairs, then three at a time; each with what it needs, and none twice."""
    present = features(config)
    seen: set[Features] = set()
    for count in range(4):
        for chosen in itertools.combinations(present, count):
            closed = frozenset(itertools.chain(chosen, *(NEEDS.get(name, ()) for name in chosen)))
            if closed not in seen:
                seen.add(closed)
                yield closed


def only(config: RunConfig, chosen: Features) -> RunConfig | None:
    """The job with the chosen axes at degree 2 and the chosen options, all others off; None where rules refuse it."""
    parallel, plain = config.parallel, TrainConfig()
    tp, pp, cp, ep = (2 if axis in chosen else 1 for axis in ("tp", "pp", "cp", "ep"))
    dp = 2 if "dp" in chosen or (ep > cp) else 1
    ranks = tp * pp * cp * dp
    small = replace(
        parallel,
        world_size=ranks,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=2 if "vpp" in chosen else None,
        context_parallel_size=cp,
        cp_comm_type=parallel.cp_comm_type if cp > 1 else "p2p",
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=None if tp == 1 else parallel.expert_tensor_parallel_size,
        sequence_parallel="sp" in chosen,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split and pp > 1,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split and pp > 1,
        use_distributed_optimizer=SHARDED in chosen,
        overlap_grad_reduce=REDUCE in chosen,
        overlap_param_gather=GATHER in chosen,
        ddp_bucket_size=parallel.ddp_bucket_size if REDUCE in chosen else None,
        reduce_scatter_with_fp32_accumulation=parallel.reduce_scatter_with_fp32_accumulation and SHARDED in chosen,
    )
    train = config.train
    if RECOMPUTE not in chosen:
        train = replace(
            train,
            recompute_granularity=plain.recompute_granularity,
            recompute_method=plain.recompute_method,
            recompute_num_layers=plain.recompute_num_layers,
            recompute_modules=plain.recompute_modules,
        )
    variant = replace(config, parallel=small, train=train)
    return None if ranks > world_size(config) or rules.violations(variant) else variant


def label(chosen: Features) -> str:
    """``tp+sp``; what is always there with another (pp with vpp) is not named."""
    if not chosen:
        return "none: one rank alone differs too"
    hidden = {"pp"} if "vpp" in chosen else set()
    order = ["dp", "tp", "pp", "cp", "ep", "sp", "vpp", RECOMPUTE, SHARDED, REDUCE, GATHER]
    return "+".join(name for name in order if name in chosen - hidden)
