"""Plants values that are not finite into a run, in one place each, and says what a run should call that place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.train.hook import Hook

STEP = 2
"""The update whose loss or gradient is not finite first."""


@dataclass(frozen=True)
class Fault:
    """One value that is not finite.

    Attributes:
        place: "parameter", "optimizer state", "master copy", "input", "forward", "backward" or "reduction".
        module: global name of the module, or of the parameter's module, or of the input tensor.
        rank: the only rank on which it is planted.
        tensor: the parameter or the state; what attribution calls the tensor where that is something else.
        micro_batch: the only one, where it strikes while something is computed.
        once: it strikes in the step, but not when the step is run again.
    """

    place: str
    module: str
    rank: int = 0
    tensor: str = "weight"
    micro_batch: int | None = None
    once: bool = False


def plant(fault: Fault, samples: Path) -> None:
    """Give a run of ``run.train`` in this process the fault; writes the names of the samples it strikes."""
    from megatron_slm import run

    build = run.build_hooks

    def with_fault(resolved: Any, data: Any, plan: Any, *rest: Any, **options: Any) -> list[Hook]:
        return [*build(resolved, data, plan, *rest, **options), Plant(fault, plan.groups, samples)]

    run.build_hooks = with_fault


class Plant(Hook):
    """Makes the fault strike in step ``STEP``, whenever that is run.

    Args:
        samples: JSON file for the names of the samples of the fault's micro-batch.
    """

    def __init__(self, fault: Fault, groups: Any, samples: Path | None = None) -> None:
        self.fault, self.groups, self._samples = fault, groups, samples
        self._mine = dist.get_rank() == fault.rank
        self._armed = False
        self._started: dict[int, int] = {}
        self._batches = 1

    def before_run(self, state: Any) -> None:
        if not self._mine:
            return
        if self.fault.place in ("forward", "backward"):
            self._watch(state)
        if self.fault.place == "reduction":
            self._spoil_reduction(state)

    def before_forward(self, state: Any, inputs: Any) -> None:
        self._armed = state.step + 1 == STEP
        self._batches, self._started = len(inputs.micro_batches), {}
        if not self._armed:
            return
        if self._mine and self._samples is not None and self.fault.micro_batch is not None:
            self._samples.write_text(json.dumps(self._struck(state.cursor, inputs)))
        if self._mine and self.fault.place == "parameter":
            spoil(parameter(state, f"{self.fault.module}.{self.fault.tensor}"))
        # All ranks of a model replica read the same batch.
        if self.fault.place == "input" and self.groups.dp.rank() == self.dp_rank():
            spoil(inputs.micro_batches[self.fault.micro_batch][self.fault.module], math.inf)

    def before_update(self, state: Any, inputs: Any) -> None:
        if state.step + 1 != STEP - 1 or not self._mine:
            return
        if self.fault.place == "optimizer state":
            moments = inner_state(state, f"{self.fault.module}.weight")
            spoil(moments[self.fault.tensor], -1.0 if self.fault.tensor == "exp_avg_sq" else math.nan)
        if self.fault.place == "master copy":
            spoil(master(state, f"{self.fault.module}.{self.fault.tensor}"))

    def after_run(self, state: Any, code: int) -> None:
        self._armed = False

    def dp_rank(self) -> int:
        """Data-parallel rank of the fault's rank: tp is the fastest axis, then cp, pp the slowest."""
        return self.fault.rank // (self.groups.tp.size() * self.groups.cp.size()) % self.groups.dp.size()

    def _struck(self, cursor: Any, inputs: Any) -> list[str]:
        """Micro-batches are dealt to the data-parallel ranks in turn."""
        size = len(inputs.micro_batches[0]["tokens"])
        turn = self.fault.micro_batch * self.groups.dp.size() + self.dp_rank()
        names = []
        for position in range(cursor.consumed_samples + turn * size, cursor.consumed_samples + (turn + 1) * size):
            sample = cursor.order.sample_id(position)
            names.append(f"position {position} ({sample.source}, epoch {sample.epoch}, sample {sample.index})")
        return names

    def _strikes(self, chunk: int) -> bool:
        started = self._started.get(chunk, 0) - 1
        first_run = started < self._batches
        return self._armed and started % self._batches == self.fault.micro_batch and (first_run or not self.fault.once)

    def _watch(self, state: Any) -> None:
        """Spoil the output of the module, or its gradient, in the chosen micro-batch."""
        from megatron.core.tensor_parallel.random import is_checkpointing

        from megatron_slm.parallel.gradients import unwrap
        from megatron_slm.train.optimizer_state import global_name

        for index, chunk in enumerate(state.chunks):

            def count(*_: Any, index: int = index) -> None:
                self._started[index] = self._started.get(index, 0) + 1

            def strike(module: Any, args: Any, output: Any, index: int = index) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                recomputed = is_checkpointing() and torch.is_grad_enabled()
                # Of a pipeline's micro-batches an earlier one may be recomputed than the one that was started last.
                if not self._strikes(index) or (recomputed and self.fault.place == "forward"):
                    return
                if self.fault.place == "backward":
                    if tensor.requires_grad:
                        tensor.register_hook(spoiled)
                else:
                    spoil(tensor)

            chunk.register_forward_pre_hook(count)
            for name, module in unwrap(chunk).named_modules():
                if global_name(unwrap(chunk), name) == self.fault.module:
                    module.register_forward_hook(strike)

    def _spoil_reduction(self, state: Any) -> None:
        from megatron.core.utils import get_model_config

        config = get_model_config(state.chunks[0])
        finalize, calls = config.finalize_model_grads_func, []

        def reduce(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            calls.extend([1] * self._armed)
            if self._armed and (len(calls) == 1 or not self.fault.once):
                spoil(parameter(state, f"{self.fault.module}.{self.fault.tensor}").main_grad)

        config.finalize_model_grads_func = reduce


def spoil(tensor: torch.Tensor, value: float = math.nan) -> None:
    """One element becomes ``value``, in place."""
    with torch.no_grad():
        tensor.data.view(-1)[tensor.numel() // 2] = value


def spoiled(gradient: torch.Tensor) -> torch.Tensor:
    """A copy with one bad element."""
    copy = gradient.clone()
    spoil(copy)
    return copy


def parameter(state: Any, name: str) -> Any:
    """The rank's parameter of that global name."""
    from megatron_slm.train.optimizer_state import named_parameters

    return dict(named_parameters(state.chunks))[name]


def master(state: Any, name: str) -> torch.Tensor:
    """This rank's master weights of a parameter."""
    from megatron_slm.train.optimizer_state import named_masters

    return next(each.tensor for each in named_masters(state.optimizer, state.chunks) if each.name == name)


def inner_state(state: Any, name: str) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter."""
    from megatron_slm.train.optimizer_state import inner_optimizers

    own = master(state, name)
    found: dict[str, torch.Tensor] = next(
        inner.optimizer.state[own] for inner in inner_optimizers(state.optimizer) if own in inner.optimizer.state
    )
    return found
