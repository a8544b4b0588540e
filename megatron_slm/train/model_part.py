"""A second trained model in a checkpoint: its weights and optimizer under a name of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.checkpoint import sharded_models
from megatron_slm.train.optimizer_shards import load_optimizer_state, optimizer_shards, under_prefix


class ModelPart:
    """Weights and optimizer of a model beside the one that the run is about.

    Args:
        name: its keys in the checkpoint begin with it.
        chunks: wrapped, laid out as the run's own.
    """

    def __init__(self, name: str, chunks: list[nn.Module], optimizer: Any) -> None:
        self.name, self.chunks, self.optimizer = name, chunks, optimizer

    def sharded_state(self, models: dict[str, Any]) -> dict[str, Any]:
        """Everything of this model, to be saved or to be filled; collective."""
        own = sharded_models(self.chunks)
        state = optimizer_shards(self.optimizer, self.chunks, own)
        return {
            "models": {place: self._named(entries) for place, entries in own.items()},
            "shards": {key: _with_room(entry) for key, entry in self._named(state["shards"]).items()},
            "step": state["step"],
        }

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over what was read."""
        for chunk, weights in zip(self.chunks, loaded["models"].values(), strict=True):
            unwrap(chunk).load_state_dict(weights)
        load_optimizer_state(self.optimizer, self.chunks, {"shards": loaded["shards"], "step": loaded["step"]})

    def _named(self, entries: dict[str, Any]) -> dict[str, Any]:
        return {key: _under(entry, f"{self.name}.") for key, entry in entries.items()}


def _under(entry: Any, prefix: str) -> Any:
    """The entry under another key. Objects too: where two models share a key, neither can be read alone."""
    if isinstance(entry, ShardedObject):
        return replace(entry, key=prefix + entry.key)
    return under_prefix(entry, prefix)


def _with_room(entry: Any) -> Any:
    """The entry with memory to read into: only the rank that writes it has been given the tensor."""
    if (
        isinstance(entry, ShardedTensor | ShardedTensorFactory)
        and isinstance(entry.data, Tensor)
        and entry.data.is_meta
    ):
        return replace(entry, data=torch.empty(entry.data.shape, dtype=entry.data.dtype))
    return entry
