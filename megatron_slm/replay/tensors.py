"""The tensors of a rank that a step begins and ends with, under their global names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.optimizer_state import (
    Master,
    global_name,
    inner_optimizers,
    named_masters,
    named_parameters,
)


class Named(NamedTuple):
    """Tensors and their names, in one order."""

    names: list[str]
    tensors: list[Tensor]

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one."""
        self.names.append(name)
        self.tensors.append(tensor)


class Held:
    """What this rank holds, found once: an update changes values, not places. A roll-back changes both."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """Find parameters, master weights and optimizer state."""
        self.masters = named_masters(optimizer, list(chunks))
        self.names: dict[nn.Parameter, str] = {param: name for name, param in named_parameters(list(chunks))}
        self._local: dict[tuple[int, ...], Named] = {}
        self.parameters = self._parameters(chunks)
        self.optimizer = self._optimizer(optimizer)

    def gradients(self) -> Named:
        """What this rank will update with: reduced, in the optimizer's own tensors."""
        found = Named([], [])
        for master in self.masters:
            if master.tensor.grad is not None:
                found.add(part_name(master), master.tensor.grad)
        return found

    def local_gradients(self, params: Sequence[Any]) -> Named:
        """The gradient buffers of some parameters; the same object as long as they stay in place."""
        key = tuple(param.main_grad.data_ptr() for param in params)
        if key not in self._local:
            self._local[key] = Named([self.names[param] for param in params], [param.main_grad for param in params])
        return self._local[key]

    def _parameters(self, chunks: Sequence[Any]) -> Named:
        found = Named([], [])
        if any(chunk.ddp_config.overlap_param_gather for chunk in chunks):
            # The rest is on its way until the next forward pass; its owners note it.
            for master in self.masters:
                flat = master.param.detach().view(-1)
                found.add(part_name(master), flat[master.start : master.start + master.tensor.numel()])
        else:
            for param, name in self.names.items():
                found.add(name, param)
        for model in map(unwrap, chunks):
            for name, buffer in model.named_buffers():
                if name.endswith("expert_bias") and buffer is not None:
                    found.add(global_name(model, name), buffer)
        return found

    def _optimizer(self, optimizer: Any) -> Named:
        found = Named([], [])
        states: dict[Tensor, dict[str, Any]] = {}
        for inner in inner_optimizers(optimizer):
            states |= inner.optimizer.state
        for master in self.masters:
            name = part_name(master)
            own = master.tensor.untyped_storage().data_ptr()
            if own != master.param.untyped_storage().data_ptr():
                found.add(f"{name}.master", master.tensor)
            for key, value in states.get(master.tensor, {}).items():
                if isinstance(value, Tensor):
                    found.add(f"{name}.{key}", value)
        return found


def part_name(master: Master) -> str:
    """The parameter's name, and where in it this rank's part begins if it is not all of it."""
    whole = master.tensor.numel() == master.param.numel()
    return master.name if whole else f"{master.name}[{master.start}:{master.start + master.tensor.numel()}]"
