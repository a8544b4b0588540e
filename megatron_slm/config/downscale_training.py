"""A training job of the same shape in about twenty steps: batches, schedule, intervals, and the data's own plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_slm.config import mixture_text
from megatron_slm.config.downscale_axes import HELD, Degrees
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.config import DataConfig
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import layer_split
from megatron_slm.train.batch_size import rampup
from megatron_slm.train.config import CheckpointConfig, LogConfig, ScheduleConfig, TrainConfig

STEPS, FEWEST_STEPS, STEPS_OF_ALL_RUNS = 20, 10, 60
"""Steps of one run, fewer where there are many runs."""

_MICRO_BATCH, _ACCUMULATED, _LARGEST_WINDOWS = 2, 3, 8
_ROLLBACK = "rollback"

_STEPS = "the same part of a short run"
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "train.micro_batch_size": "two samples at most",
        "train.global_batch_size": "micro-batches to accumulate and to fill the pipeline, the same batch in every run",
        "train.rampup_batch_size": "its first batch is one micro-batch for every stage and replica",
        "train.train_iters": "a short run",
        "train.eval_interval": "twice at most",
        "train.eval_iters": "one batch",
        "train.exit_interval": "a short run ends by itself",
        "train.exit_duration_in_mins": "a short run ends by itself",
        "train.recompute_num_layers": "its part of a chunk's layers",
        "schedule.lr_warmup_iters": _STEPS,
        "schedule.lr_decay_iters": _STEPS,
        "schedule.lr_wsd_decay_iters": _STEPS,
        "checkpoint.save_interval": "one save, at the end; more where a policy rolls back",
        "checkpoint.save_retain_interval": "one save, at the end",
        "checkpoint.keep_last": "one save, at the end",
        "checkpoint.pretrained_checkpoint": "its weights have another shape",
        "log.log_interval": "four lines of the log",
        "log.layer_norms_interval": _STEPS,
        "log.noise_scale_interval": _STEPS,
        "data.phases": "the same part of the run's samples",
        "data.length_schedule": "the same part of samples and of a sample",
        "data.replay_run": "its samples have another length",
        "data.replay_share": "nothing is replayed",
    }
)
"""Key -> why it changes."""


def shrunken(config: RunConfig, original: Degrees, held: Sequence[Degrees]) -> RunConfig:
    """``config`` with the sections around the model made small; ``config.model`` is the small model already.

    Args:
        original: degrees of the large job.
        held: degrees of the small runs, which all train on the same batches.
    """
    steps = max(FEWEST_STEPS, min(STEPS, STEPS_OF_ALL_RUNS // len(held)))
    steps = min(config.train.train_iters, steps)
    share = steps / max(1, config.train.train_iters)
    train = _batches(config.train, original, held, config)
    train = dataclasses.replace(
        train,
        train_iters=steps,
        eval_interval=config.train.eval_interval and max(_part(config.train.eval_interval, share), -(-steps // 2)),
        eval_iters=min(config.train.eval_iters, 1),
        exit_interval=None,
        exit_duration_in_mins=None,
        recompute_num_layers=_recomputed(config, original, held),
    )
    train = dataclasses.replace(train, rampup_batch_size=_rampup(config.train, train, original, held))
    return dataclasses.replace(
        config,
        train=train,
        schedule=_schedule(config.schedule, share, steps),
        checkpoint=_checkpoint(config.checkpoint, train),
        log=_log(config.log, share, steps),
    )


def data_plans(config: RunConfig, small: RunConfig) -> DataConfig:
    """Phases and windows of the original at the same part of the small run's samples."""
    before, after = (one.train.train_iters * one.train.global_batch_size for one in (config, small))
    share = after / max(1, before)
    data = config.data
    phases, lengths = _read(data.phases, mixture_text.phases), _read(data.length_schedule, mixture_text.lengths)
    starts = _starts([start for start, _ in phases], share)
    texts = [item.partition(":")[2] or item.partition("=")[2] for item in data.phases]
    if phases:
        data = dataclasses.replace(
            data, phases=tuple(f"{start}:{text}" for start, text in zip(starts, texts, strict=True))
        )
    if lengths and small.model.seq_length != config.model.seq_length:
        starts = _starts([start for start, _ in lengths], share)
        windows = [_window(tokens, config.model.seq_length, small.model.seq_length) for _, tokens in lengths]
        data = dataclasses.replace(
            data, length_schedule=tuple(f"{start}: {tokens}" for start, tokens in zip(starts, windows, strict=True))
        )
    return dataclasses.replace(data, replay_run=None, replay_share=DataConfig().replay_share)


def _batches(train: TrainConfig, original: Degrees, held: Sequence[Degrees], config: RunConfig) -> TrainConfig:
    """Micro-batches as large and as many as show what the original does with them."""
    size = min(train.micro_batch_size, _MICRO_BATCH)
    accumulated = -(-train.global_batch_size // (train.micro_batch_size * original.dp))
    # Twice what a pipeline holds: with interleaving the first stage reaches its steady state only then.
    count = min(2 * HELD if original.pp > 1 else _ACCUMULATED, accumulated)
    if original.pp > 1:
        count = max(count - count % HELD, HELD)
    if original.vpp > 1 and config.log.noise_scale_interval is not None:
        count = max(count, 2 * HELD)  # the scale compares the first HELD micro-batches with all
    if train.rampup_batch_size:
        count = max(count, 2 * _rampup_unit(original))
    replicas = math.lcm(*(job.dp for job in held))
    return dataclasses.replace(train, micro_batch_size=size, global_batch_size=size * replicas * count)


def _rampup_unit(original: Degrees) -> int:
    """Micro-batches that every replica needs at least: a group of the interleaved schedule."""
    return HELD if original.vpp > 1 else 1


def _rampup(large: TrainConfig, small: TrainConfig, original: Degrees, held: Sequence[Degrees]) -> tuple[str, ...]:
    """From the smallest batch to twice that, over the same part of the run."""
    try:
        ramp = rampup(large)
    except ConfigError:
        return large.rampup_batch_size  # the rule on it speaks
    if ramp is None:
        return ()
    unit = small.micro_batch_size * math.lcm(*(job.dp for job in held)) * _rampup_unit(original)
    before, after = (one.train_iters * one.global_batch_size for one in (large, small))
    samples = max(1, round(ramp.samples * after / max(1, before)))
    return (str(unit), str(unit), str(samples))


def _recomputed(config: RunConfig, original: Degrees, held: Sequence[Degrees]) -> int | None:
    """Layers of a recomputed unit: part of a chunk where the original's are, else whole ones."""
    unit = config.train.recompute_num_layers
    if unit is None or config.train.recompute_granularity != "full":
        return unit
    sizes = {size for job in held for size in _chunk_sizes(config, job)}
    fitting = [size for size in range(1, min(unit, 2) + 1) if all(chunk % size == 0 for chunk in sizes)]
    return fitting[-1] if config.train.recompute_method == "uniform" else 1


def _chunk_sizes(config: RunConfig, job: Degrees) -> set[int]:
    """Numbers of layers that the chunks of a small run hold."""
    if job.pp == 1:
        return {config.model.num_layers}
    parallel = config.parallel
    small = dataclasses.replace(
        parallel, pipeline_model_parallel_size=job.pp, virtual_pipeline_model_parallel_size=job.vpp
    )
    split = layer_split(config.model.num_layers, small)
    return {size for stage in split for size in stage if size}


def _schedule(plan: ScheduleConfig, share: float, steps: int) -> ScheduleConfig:
    """Warm-up, decay and last part in their proportions, each of at least one step."""
    decay = plan.lr_decay_iters and max(2, _part(plan.lr_decay_iters, share))
    end = decay or steps
    warmup = min(_part(plan.lr_warmup_iters, share), max(0, end - 2)) if plan.lr_warmup_iters else 0
    last = plan.lr_wsd_decay_iters
    return dataclasses.replace(
        plan,
        lr_warmup_iters=warmup,
        lr_decay_iters=decay,
        lr_wsd_decay_iters=last and max(1, min(_part(last, share), end - warmup)),
    )


def _checkpoint(plan: CheckpointConfig, train: TrainConfig) -> CheckpointConfig:
    """One checkpoint at the end, and what a roll-back goes back to."""
    rolls_back = _ROLLBACK in (train.non_finite_policy, train.spike_policy)
    return dataclasses.replace(
        plan,
        save_interval=max(1, train.train_iters // 2) if rolls_back and plan.save_interval else None,
        keep_last=None,
        save_retain_interval=None,
        pretrained_checkpoint=None,
    )


def _log(log: LogConfig, share: float, steps: int) -> LogConfig:
    """Four lines, and every measurement of the original at least once."""
    return dataclasses.replace(
        log,
        log_interval=min(log.log_interval, max(1, steps // 4)),
        layer_norms_interval=log.layer_norms_interval and _within(log.layer_norms_interval, share, steps),
        noise_scale_interval=log.noise_scale_interval and _within(log.noise_scale_interval, share, steps),
    )


def _within(interval: int, share: float, steps: int) -> int:
    """The same part of a shorter run, reached in it."""
    return max(1, min(steps, _part(interval, share)))


def _part(count: int, share: float) -> int:
    """The same part of a shorter run, at least one."""
    return max(1, round(count * share))


def _starts(starts: Sequence[int], share: float) -> list[int]:
    """First samples at the same part of a shorter run, ascending as the original's are."""
    found: list[int] = []
    for start in starts:
        least = found[-1] + 1 if found else min(start, 1)
        found.append(max(least, round(start * share)))
    return found


def _window(tokens: int, before: int, after: int) -> int:
    """A window that divides the shorter sample about as the original's divides its own."""
    parts = min(before // tokens, _LARGEST_WINDOWS)
    while after % parts:
        parts -= 1
    return after // parts


def _read(items: Sequence[str], parse: Callable[[Sequence[str]], Any]) -> list[tuple[int, Any]]:
    """What a list of the data section says; nothing where it is malformed, which a rule says."""
    try:
        found: list[tuple[int, Any]] = parse(items)
    except ConfigError:
        return []
    return found
