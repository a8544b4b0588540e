"""How much more than its even share of tokens a rank's experts may get. Arithmetic, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slm.config.run_config import RunConfig

if TYPE_CHECKING:
    from megatron_slm.memory.ledger import Row

HOTTEST = 2.0
"""Tokens of the fullest rank over an even share, at the most. Megatron 0.16.1's functional tests above 8 GiB, whose
routers begin untrained, imply 1.02 to 1.97 (measured peak less what is predicted under an even load, over the bytes of
this module's rows); where routing is forced to be even (SimuMax's runs), peaks are met within 0.2 %."""

ROUTED = re.compile(r"\.mlp(\.experts(\..*)?)?$")
"""Modules of an MoE layer that hold tokens after the choice of experts: the layer itself, which permutes and exchanges
them, and its experts; not the router, nor the shared expert."""
MOVING = ("activations", "recompute", "communication buffers", "workspace")


def hottest(config: RunConfig) -> float:
    """Upper bound of a rank's tokens over its even share.

    A rank that holds all experts has all tokens, however they are routed; tokens beyond an expert's capacity are
    dropped; no rank has more than all of them.
    """
    model, ep = config.model, config.parallel.expert_model_parallel_size
    if model.num_moe_experts is None:
        return 1.0
    capacity = model.moe_expert_capacity_factor
    return max(1.0, min(HOTTEST, float(ep), HOTTEST if capacity is None else capacity))


def with_hot_experts(rows: Sequence[Row], config: RunConfig) -> list[Row]:
    """Rows whose upper bound allows for a hot expert; what is expected, and the lower bound, are of an even load."""
    factor, model = hottest(config), config.model
    if factor == 1.0:
        return list(rows)
    sparse = {f"layer_{index}" for index in range(model.num_layers) if model.is_moe_layer(index)}
    return [
        row._replace(high=round(row.high * factor))
        if row.kind in MOVING and ROUTED.search(row.module) and (row.layer in sparse or "experts" in row.module)
        else row
        for row in rows
    ]
