"""Exponential moving average of the weights: average = decay x average + (1 - decay) x weights after every update.

It is taken of the optimizer's own tensors: fp32 beside bf16 weights, and divided over data-parallel ranks as the
distributed optimizer divides them. It begins as the weights the run begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_slm.parallel.gradients import gather_parameters, gathered_parameters, unwrap
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.optimizer_shards import under_prefix
from megatron_slm.train.optimizer_state import dividing_groups, inner_optimizers, named_masters
from megatron_slm.train.step import TrainState

PREFIX = "ema."
"""Of the averages' keys in a checkpoint; behind it stands the key of the weight."""


class Ema(Hook):
    """The averages: a hook that takes them, and a part of the state that a checkpoint holds.

    It must be called before the hooks that read it (validation, checkpoints).
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: list[Any], *, decay: float, groups: Any) -> None:
        """Begin with the present weights.

        Args:
            chunks: wrapped model chunks of this rank.
            decay: share of the old average that stays, between 0 and 1.
            groups: process groups.
        """
        self._decay = decay
        self._groups = dividing_groups(optimizer)
        self._parameters = [dict(unwrap(chunk).named_parameters()) for chunk in chunks]
        masters = named_masters(optimizer, chunks)
        self._weights: list[Tensor] = [master.tensor.detach() for master in masters]
        self._averages = [weights.clone() for weights in self._weights]
        places = zip(masters, self._averages, strict=True)
        self._held = {master.param: (master.start, average) for master, average in places}
        self._loaded = self._applied = False

    def before_run(self, state: TrainState) -> None:
        """Begin with the weights that were loaded, unless averages were."""
        if self._averages and not self._loaded:
            torch._foreach_copy_(self._averages, self._weights)
        self._loaded = False

    def rewind(self, state: TrainState) -> None:
        """The same, for a checkpoint that the run went back to."""
        self.before_run(state)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Take in the weights after an update."""
        if self._averages and not result.skipped:  # torch refuses an empty list
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)

    @contextmanager
    def applied(self, state: TrainState) -> Iterator[None]:
        """The model's weights are the averages for a while; then they are again what they were, bit by bit. Collective.

        Meanwhile no step may be taken and nothing saved: the optimizer's tensors and the averages have changed places.
        After an error they stay so, because it may be this rank's alone, and the others would not take part.
        """
        self._exchange(state)
        self._applied = True
        yield
        self._exchange(state)
        self._applied = False

    def sharded_state(self, models: dict[str, Any]) -> dict[str, Any]:
        """The averages in the places of the weights, in full precision and on the host; collective."""
        assert not self._applied, "the weights are the averages now: a checkpoint would take the one for the other"
        return {
            name: {key: under_prefix(entries[key], PREFIX, self._whole(param)) for key, param in parameters.items()}
            for (name, entries), parameters in zip(models.items(), self._parameters, strict=True)
        }

    def load(self, loaded: dict[str, Any]) -> None:
        """Keep this rank's part of what was read."""
        whole = {
            param: entries[key]
            for entries, parameters in zip(loaded.values(), self._parameters, strict=True)
            for key, param in parameters.items()
        }
        for param, (start, average) in self._held.items():
            part = whole[param].reshape(-1)[start : start + average.numel()]
            average.copy_(part.view_as(average))
        self._loaded = True

    def _exchange(self, state: TrainState) -> None:
        """Let optimizer tensors and averages change places, and the model follow. Memory: one tensor more."""
        with torch.no_grad(), gathered_parameters(state.chunks):
            for weights, average in zip(self._weights, self._averages, strict=True):
                kept = weights.clone()
                weights.copy_(average)
                average.copy_(kept)
            for inner in inner_optimizers(state.optimizer):
                if hasattr(inner, "_copy_main_params_to_model_params"):  # an fp32 model is its own master
                    inner._copy_main_params_to_model_params()
            gather_parameters(state.chunks)

    def _whole(self, param: nn.Parameter) -> Tensor:
        """The average of one parameter, in its shape on the host, put together from the ranks that hold parts of it."""
        exact = torch.promote_types(param.dtype, torch.float32)
        if param not in self._groups:  # it is frozen, and its own average
            return param.detach().to(exact).cpu()
        whole = torch.zeros(param.numel(), dtype=exact, device=param.device)
        if param in self._held:
            start, average = self._held[param]
            whole[start : start + average.numel()] = average.view(-1)
        if (group := self._groups.get(param)) is not None:
            # One rank holds each element. As integers the zeros of the others change no bit, not even that of -0.0.
            dist.all_reduce(whole.view(torch.int64 if exact == torch.float64 else torch.int32), group=group)
        return whole.view(param.shape).cpu()


def ema_request(models: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a model's chunks, asking a checkpoint for the averages in the places of the weights.

    What is read is rounded to the model's format, as ``Ema.applied`` does. What is no weight (a router's bias against
    overload) has no average and is read itself.
    """
    return {
        name: {
            key: under_prefix(entry, PREFIX) if isinstance(entry.data, nn.Parameter) else entry
            for key, entry in entries.items()
        }
        for name, entries in models.items()
    }
