"""``mslm profile``: a training up to the last profiled step, in a run of its own that saves and validates nothing.

It is built as ``run.py`` builds any run, and its steps are those of the run it is named after: ``train.train_iters``
and the schedule stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_slm.config.load import Resolved
from megatron_slm.errors import ConfigError
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.run import assembled, hooks_of, memory_explained
from megatron_slm.run_beside import beside_of, inputs_of, require_isolated_documents
from megatron_slm.run_hooks import build_interventions, stop_rule
from megatron_slm.train.guard import Guard
from megatron_slm.train.hooks import CheckpointHook
from megatron_slm.train.loop import run_loop

SUFFIX = "-profile"


def profiled(resolved: Resolved, environment: RankEnvironment) -> int:
    """Train until the last profiled step. Collective.

    Args:
        resolved: its ``profile`` section names the steps, the ranks and the tools.

    Returns:
        0 when the last profiled step was made; 75 when the run was stopped before.

    Raises:
        UserError: the configuration or the data is refused, or a tool is missing.
    """
    steps = resolved.config.profile.chosen
    if steps is None:
        raise ConfigError("no steps are named to be profiled; add --steps FIRST:LAST")
    own = profile_configuration(resolved)
    config = own.config
    with assembled(own, environment, fresh=True) as run, memory_explained(run):
        beside = beside_of(run)
        require_isolated_documents(run, beside)
        return run_loop(
            run.state,
            run.plan,
            inputs_of(run, beside),
            [hook for hook in hooks_of(run, beside) if not isinstance(hook, CheckpointHook)],
            train_iters=steps.last,
            should_stop=stop_rule(config, run.stop),
            guard=Guard(config.train, None),
            interventions=build_interventions(own, run.data, run.loader, run.layout, run.directory, run.log),
        )


def profile_configuration(resolved: Resolved) -> Resolved:
    """The run that a profile is: a name of its own, and nothing that would come between its steps."""
    config = resolved.config
    changes: dict[str, Any] = {
        "eval_iters": 0,
        "eval_interval": None,
        "exit_interval": None,
        "early_stopping_patience": None,
    }
    changed = replace(config, name=f"{config.name}{SUFFIX}", train=replace(config.train, **changes))
    keys = ["name", *(f"train.{key}" for key in changes)]
    return Resolved(changed, {**resolved.provenance, **dict.fromkeys(keys, "mslm profile")})
