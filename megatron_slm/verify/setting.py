"""What of a configuration is compared: the same model and batch, in two precisions and on one rank. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig

TIMEOUT_MINUTES = 3.0
"""A collective of a shrunk model takes milliseconds; a rank that waits this long waits for ever."""

MICRO_BATCHES = 4
"""At least; two a replica, and two for each of two pipeline stages."""

HEAD_DEVIATION = 0.02
"""Of a reward model's head where the configuration begins with zeros."""

VOCAB_SIZE = 500
"""Where the configuration leaves it to the tokenizer. No multiple of 128: padding rows must stay out of the loss."""


def compared(config: RunConfig, *, exact: bool) -> RunConfig:
    """The configuration as it is compared: on CPU ranks, without dropout, whose masks are drawn per rank.

    Args:
        exact: in float64, where everything but a fault of structure is of the order 1e-15.
    """
    precision = PrecisionConfig(fp64=True) if exact else config.precision
    model = replace(
        config.model,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=config.model.vocab_size or VOCAB_SIZE,
    )
    parallel = replace(
        config.parallel,
        device="cpu",
        distributed_backend=None,
        distributed_timeout_minutes=TIMEOUT_MINUTES,
        # It would round float64 sums to fp32.
        reduce_scatter_with_fp32_accumulation=config.parallel.reduce_scatter_with_fp32_accumulation and not exact,
    )
    train = replace(
        config.train,
        ema_decay=None,
        rampup_batch_size=(),
        spike_policy="off",
        global_batch_size=_with_micro_batches(config.train),
    )
    # A head of zeros would hand no gradient to the model below it.
    reward = replace(config.reward, reward_head_init_std=config.reward.reward_head_init_std or HEAD_DEVIATION)
    return replace(config, model=model, parallel=parallel, precision=precision, train=train, reward=reward)


def _with_micro_batches(train: TrainConfig) -> int:
    """Samples of a global batch of at least so many micro-batches that one of them can hold no token of the loss."""
    count = train.global_batch_size // train.micro_batch_size
    return train.micro_batch_size * (count if count >= MICRO_BATCHES else math.lcm(count, MICRO_BATCHES))


def one_rank(config: RunConfig, *, distributed_optimizer: bool = False) -> RunConfig:
    """The same model and batch on one rank, by the plainest means: nothing recomputed, sharded or overlapped.

    Args:
        distributed_optimizer: of core; a checkpoint is read by the kind of optimizer that has written it.
    """
    plain = TrainConfig()
    return replace(
        config,
        name=None,
        parallel=ParallelConfig(
            device="cpu",
            world_size=1,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=False,
            distributed_timeout_minutes=TIMEOUT_MINUTES,
        ),
        train=replace(
            config.train,
            recompute_granularity=plain.recompute_granularity,
            recompute_method=plain.recompute_method,
            recompute_num_layers=plain.recompute_num_layers,
            recompute_modules=plain.recompute_modules,
        ),
    )


def world_size(config: RunConfig) -> int:
    """Ranks of the job."""
    return config.parallel.world_size or config.parallel.smallest_world_size


def own_precision(config: RunConfig) -> str:
    """The configuration's own precision in a word."""
    return "bf16" if config.precision.bf16 else "fp64" if config.precision.fp64 else "fp32"


def differing(config: RunConfig, other: RunConfig) -> list[str]:
    """Dotted keys in which two configurations differ."""
    found = []
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            names = [part.name for part in dataclasses.fields(mine)]
            found += [f"{field.name}.{name}" for name in names if getattr(mine, name) != getattr(theirs, name)]
        elif mine != theirs:
            found.append(field.name)
    return found
