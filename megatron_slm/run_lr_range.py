"""``mslm train --lr-range-test``: a training whose learning rate rises until the loss says enough.

It is built as ``run.py`` builds any run, and takes its steps without checkpoints, validation and schedule.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from megatron_slm.config import rules
from megatron_slm.config.load import Resolved
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.run import assembled
from megatron_slm.run_beside import inputs_of
from megatron_slm.run_hooks import stop_rule
from megatron_slm.run_parts import Run
from megatron_slm.train.guard import Guard
from megatron_slm.train.loop import EXIT_REACHED, EXIT_STOPPED
from megatron_slm.train.lr_range import Curve, LearningRateRange, draw, range_record, suggest
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.step import train_step

SUFFIX = "-lr-range-test"


def range_test(resolved: Resolved, environment: RankEnvironment, span_text: str) -> int:
    """Train while the learning rate rises, write the curve, its picture and a suggestion. Collective.

    Args:
        span_text: LOW:HIGH; the steps are ``train.train_iters``.

    Returns:
        0 when the range is used up, or the loss was past its best for good; 75 when the test was stopped before.

    Raises:
        UserError: the range, the configuration or the data is refused; nothing was changed.
    """
    span = LearningRateRange.parse(span_text, resolved.config.train.train_iters)
    rules.require(resolved.config, environment.world_size, provenance=resolved.provenance)
    with assembled(range_test_configuration(resolved), environment, fresh=True) as run:
        if run.log is not None:
            run.log.say(f"learning-rate range test: {span.low:g} to {span.high:g} over {span.steps} steps")
        curve, code = climb(run, span)
        if run.log is not None:
            report(curve, span, run.directory, run.log)
            run.log.after_run(run.state, code)
    return code


def climb(run: Run, span: LearningRateRange) -> tuple[Curve, int]:
    """Take the steps; returns what was seen, equal on every rank, and the exit code. Collective."""
    config, state, log = run.resolved.config, run.state, run.log
    plan = replace(run.plan, learning_rate=span.learning_rate)
    inputs, guard, stopping = inputs_of(run), Guard(config.train), stop_rule(config, run.stop)
    curve, over = Curve(span.window), False
    if log is not None:
        log.before_run(state)
    while state.step < span.steps and not over:
        wants_stop = stopping(state.step + 1)
        outcome = train_step(state, plan, lambda: next(inputs), guard, wants_stop=wants_stop)
        if log is not None:
            log.after_step(state, outcome.result)
        over = curve.add(outcome.result.learning_rate, outcome.result.loss) or not outcome.verdict.applies
        if outcome.stop and not over and state.step < span.steps:
            return curve, EXIT_STOPPED
    return curve, EXIT_REACHED


def report(curve: Curve, span: LearningRateRange, directory: RunDirectory, log: MetricsWriter) -> None:
    """Write ``lr_range_test.json`` and ``lr_range_test.png``, and say what to copy."""
    suggestion = suggest(curve)
    record = range_record(span, curve, suggestion)
    directory.path.joinpath("lr_range_test.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if curve.losses:
        picture = directory.path / "lr_range_test.png"
        draw(curve, suggestion, directory.path.name, picture)
        log.say(f"wrote {picture}")
    if suggestion is None:
        log.say(
            f"no suggestion: in {len(curve.losses)} steps the smoothed loss never fell below its start; widen LOW:HIGH "
            "or raise train.train_iters"
        )
        return
    log.say(f"the loss falls fastest at {suggestion.steepest:.1e}; a tenth of its minimum: {suggestion.tenth:.1e}")
    log.say(f"optimizer.lr={suggestion.steepest:.1e}")


def range_test_configuration(resolved: Resolved) -> Resolved:
    """The run that a range test is: a name of its own, nothing but steps, and nothing done about a loss that rises."""
    config = resolved.config
    changes: dict[str, dict[str, Any]] = {
        "train": {
            "eval_iters": 0,
            "eval_interval": None,
            "exit_interval": None,
            "rampup_batch_size": (),
            "early_stopping_patience": None,
            "ema_decay": None,
            "non_finite_policy": "skip",
            "spike_policy": "off",
        },
        "log": {"layer_norms_interval": None, "noise_scale_interval": None},
    }
    changed = replace(
        config,
        name=f"{config.name}{SUFFIX}",
        train=replace(config.train, **changes["train"]),
        log=replace(config.log, **changes["log"]),
    )
    keys = ["name", *(f"{section}.{key}" for section, values in changes.items() for key in values)]
    return Resolved(changed, {**resolved.provenance, **dict.fromkeys(keys, "learning-rate range test")})
