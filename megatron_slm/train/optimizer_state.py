"""AdamW's moments and step counters: created before a save, and put back as they were, whatever core does to them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Core's optimizers that hold a torch optimizer; one for a dense model."""
    parts: list[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Create AdamW's moments now instead of at the first step: core can neither save nor load an empty state."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            continue
        for group in inner.optimizer.param_groups:
            for param in group["params"]:
                inner.optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put a loaded state into ``optimizer``: moments, master weights and steps, but no hyper-parameter.

    Core's own load is taken in parts, because as a whole, with torch's AdamW, it (1) looks for a step counter among the
    sharded tensors, where there is none, (2) lets all parameters share one counter, which AdamW would then advance once
    per parameter, and (3) replaces the configured rates, betas and decay by those of the checkpoint.
    """
    parts = inner_optimizers(optimizer)
    assert len(parts) == 1, "a dense model has one optimizer; chained ones are saved under their number"
    inner = parts[0]
    options = [_options(group) for group in inner.optimizer.param_groups]
    if isinstance(inner, DistributedOptimizer):
        tensors = state["param_state"]
        inner.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
        steps = {param: values.pop("step") for param, values in inner.optimizer.state.items() if "step" in values}
        inner.load_parameter_state_from_fully_reshardable(tensors)
        for param, step in steps.items():
            inner.optimizer.state[param]["step"] = step
    else:
        inner.load_state_dict(state)
    for values in inner.optimizer.state.values():
        if isinstance(values.get("step"), torch.Tensor):
            values["step"] = values["step"].clone()
    for group, kept in zip(inner.optimizer.param_groups, options, strict=True):
        group.update(kept)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration, not the checkpoint, decides in a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}
