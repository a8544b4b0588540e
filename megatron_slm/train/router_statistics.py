"""A hook that says how a mixture of experts spreads its tokens: the load of the experts, and the router's losses.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.parallel.router import BALANCING, COLUMNS, DROPPED, ENTROPY, TOKENS, Z_LOSS, Router
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.layer_norms import device_of, part_of
from megatron_slm.train.optimizer_state import global_name
from megatron_slm.train.step import TrainState

BY_LAYER = "router_by_layer"


class RouterStatistics(Hook):
    """Hands a record to ``write`` at every ``interval``-th step and at the last one: one small exchange over the world.

    The router counts while it routes, in every step. The hook comes before the log, whose line shows what it has found.
    """

    def __init__(
        self, interval: int, train_iters: int, model: ModelConfig, write: Callable[[dict[str, Any]], None] | None
    ) -> None:
        """Know which layers there are.

        Args:
            write: takes the record of :func:`router_record`, on the rank that logs.
        """
        self._interval, self._train_iters, self._write = interval, train_iters, write
        self._layers = expert_layers(model)
        self._experts = model.num_moe_experts or 0
        self._has_loss = model.moe_router_load_balancing_type != "none"

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Add up over the world what this step's tokens were given, and report it."""
        if result.step % self._interval and result.step != self._train_iters:
            return
        sums = torch.zeros(len(self._layers), self._experts + COLUMNS, dtype=torch.float64, device=device_of(state))
        for layer, router in named_routers(state.chunks):
            if router.counted is not None:
                sums[self._layers.index(layer)] += router.counted
        dist.all_reduce(sums)
        if self._write is not None:
            self._write(router_record(self._layers, sums.tolist(), has_loss=self._has_loss))


def expert_layers(model: ModelConfig) -> list[str]:
    """The layers with experts, counted from 0 over the whole model; further predictions are made by the last kind."""
    layers = [f"layer_{layer}" for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    predicting = model.mtp_num_layers or 0
    if predicting and model.is_moe_layer(model.num_layers - 1):
        layers += [f"mtp_{depth}" for depth in range(1, predicting + 1)]
    return layers


def named_routers(chunks: Sequence[Any]) -> list[tuple[str, Router]]:
    """The routers of this rank's chunks by the layer's name."""
    found = []
    for chunk in map(unwrap, chunks):
        for name, module in chunk.named_modules():
            if isinstance(module, Router):
                found.append((part_of(global_name(chunk, name)), module))
    return found


def router_record(layers: Sequence[str], sums: Sequence[Sequence[float]], *, has_loss: bool) -> dict[str, Any]:
    """Values by name, each as mean over the layers, and of each layer under "router_by_layer".

    ``router_load_max_over_mean`` is the largest load of an expert over the mean; ``router_load_entropy`` that of the
    loads as shares, and ``router_probability_entropy`` the mean entropy of a token's probabilities over all experts,
    both over log E, so that 1 is even. Loads are counted before tokens are dropped; ``router_dropped_share`` is the
    share of (token, expert) pairs that were. ``router_aux_loss`` (1 where all is even) and ``router_z_loss`` are
    without their coefficients, means over the micro-batches.

    Args:
        sums: [layers][E + COLUMNS] of ``Router.counted``, over the world.
    """
    by_layer: dict[str, dict[str, float]] = {}
    for layer, row in zip(layers, sums, strict=True):
        load, columns = row[:-COLUMNS], row[-COLUMNS:]
        pairs, tokens, even = sum(load), columns[TOKENS], math.log(len(load)) if len(load) > 1 else 1.0
        if not tokens:
            continue
        values = {
            "load_max_over_mean": max(load) * len(load) / pairs,
            "load_entropy": -sum(part / pairs * math.log(part / pairs) for part in load if part) / even,
            "probability_entropy": columns[ENTROPY] / tokens / even,
            "dropped_share": columns[DROPPED] / pairs,
            "z_loss": columns[Z_LOSS] / tokens,
        }
        if has_loss:
            values["aux_loss"] = columns[BALANCING] / tokens
        for name, value in values.items():
            by_layer.setdefault(f"router_{name}", {})[layer] = value
    means = {name: sum(values.values()) / len(values) for name, values in by_layer.items()}
    return {**means, BY_LAYER: by_layer}
