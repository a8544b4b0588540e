"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from megatron_slm.train.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, optimizer: OptimizerConfig, train_iters: int) -> float:
    """Learning rate of the update that follows ``step`` completed updates.

    The convention is Megatron's: the scheduler stands at ``num_steps = step`` while update ``step`` (counted from 0) is
    made and is advanced after it. So with warm-up the very first update has a learning rate of 0, update ``w`` is the
    first at the peak, and ``min_lr`` would be reached by update ``lr_decay_iters``, the first one after the run.
    The formulas are those of core's ``OptimizerParamScheduler.get_lr`` with ``init_lr`` 0, value for value.

    Args:
        step: updates already made, from 0.
        schedule: the shape; ``lr_decay_iters`` defaults to ``train_iters``.
        optimizer: ``lr`` and ``min_lr``.
        train_iters: updates of the whole run.

    A section that describes no schedule (warm-up longer than the run, WSD without its length) is refused by
    ``config.rules`` before a run starts.
    """
    assert step >= 0, f"step counts updates from 0, not {step}"
    decay_iters = schedule.lr_decay_iters or max(train_iters, 1)
    warmup, peak, floor = schedule.lr_warmup_iters, optimizer.lr, optimizer.min_lr
    style = schedule.lr_decay_style
    if warmup > 0 and step <= warmup:
        return peak * float(step) / float(warmup)
    if style == "constant":
        return peak
    if step > decay_iters:
        return floor
    if style == "inverse-square-root":
        return max(floor, peak * max(warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    assert warmup < decay_iters, f"warm-up of {warmup} steps leaves none for a decay that ends at {decay_iters}"
    ratio = float(step - warmup) / float(decay_iters - warmup)
    if style == "linear":
        share = 1.0 - ratio
    elif style == "cosine":
        share = 0.5 * (math.cos(math.pi * ratio) + 1.0)
    else:
        share = _wsd_share(step, schedule, decay_iters)
    return floor + share * (peak - floor)


def _wsd_share(step: int, schedule: ScheduleConfig, decay_iters: int) -> float:
    """Warm-up, stable, decay (Hu et al., arXiv 2404.06395): 1 until the last ``lr_wsd_decay_iters`` steps."""
    length = schedule.lr_wsd_decay_iters
    assert length is not None, "WSD needs lr_wsd_decay_iters"
    start = decay_iters - length
    if step <= start:
        return 1.0
    ratio = float(step - start) / float(length)
    if schedule.lr_wsd_decay_style == "linear":
        return 1.0 - ratio
    if schedule.lr_wsd_decay_style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if schedule.lr_wsd_decay_style == "exponential":
        return 2.0 * math.pow(0.5, ratio) - 1.0
    return 1.0 - math.sqrt(ratio)
