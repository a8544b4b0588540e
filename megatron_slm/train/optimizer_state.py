"""AdamW's moments and step counters: created before a save, and put back as they were, whatever core does to them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class BucketwiseState(DistributedOptimizer):
    """Core's distributed optimizer, whose gathered state lies where its readers look for it.

    Core 0.16.1 concatenates the buckets without their padding and then slices the result at offsets that count it
    (``sharded_param_state_fully_reshardable``): behind a padded bucket every moment and master weight is shifted, in
    the checkpoint and silently. Buckets are padded to multiples of lcm(dp, 128).
    """

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Core's state with each bucket's tensors moved to the bucket's own offset; None where core returns None."""
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:
            return None
        for number, buffer in enumerate(self.buffers):
            for tensors in state[number].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    if key in tensors:
                        tensors[key] = _spread(tensors[key], buffer)
        return state


def _spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Tensor [unpadded elements of all buckets] -> [elements of the buffer], padding zero."""
    spread, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return spread


def keep_buckets_in_place(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizers ``BucketwiseState``; core constructs the class by its own name."""
    for inner in inner_optimizers(optimizer):
        if type(inner) is DistributedOptimizer:
            inner.__class__ = BucketwiseState


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
