"""Parallelism bugs that real runs are struck by, for ``mslm replay layout-diff``: those of ``verify``, and more.

A bug of ``tests/parallel_faults.py`` is planted into a whole run on as many ranks as its layout has; the run that it is
compared with is of the same model on one rank.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_slm.parallel import context
from tests.axes import VALUES
from tests.parallel_faults import DP, EMBEDDING, FAULTS, PP, REDUCTION, ROUTER, Fault

LAYOUT = (
    "tp",
    "pp",
    "vpp",
    "cp",
    "ep",
    "etp",
    "dp",
    "sp",
    "optimizer",
    "gather",
    "dispatcher",
    "exchange",
    "recompute",
)
"""Axes that say who computes; the others say what."""
STEPS = (
    "train.train_iters=2",
    "train.eval_iters=0",
    "checkpoint.save_interval=1",
    "model.ffn_hidden_size=48",
    "replay.whole_steps=2",
)


STALE = "decoder.layers.3.mlp.linear_fc1.weight"
"""The first of two replicas updates it: what backward reaches first lies first in core's buffer."""


def gradients_averaged_twice() -> None:
    """Gradients that were divided by the tokens of all replicas are divided by their number once more."""
    from megatron_slm.parallel import gradients

    finalize = gradients.finalize_model_grads

    def planted(model: Any, num_tokens: Any = None, pg_collection: Any = None, **options: Any) -> Any:
        result = finalize(model, num_tokens, pg_collection=pg_collection, **options)
        for chunk in model:
            chunk.scale_gradients(1.0 / pg_collection.dp_cp.size())
        return result

    gradients.finalize_model_grads = planted


def balancing_loss_counted_once_a_replica() -> None:
    """The gradient of the experts' balancing loss is multiplied by the number of replicas."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    backward = MoEAuxLossAutoScaler.backward

    def planted(ctx: Any, gradient: Any) -> Any:
        output, loss = backward(ctx, gradient)
        return output, loss * parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    MoEAuxLossAutoScaler.backward = staticmethod(planted)


def tied_embedding_stale() -> None:
    """The last pipeline stage begins with a copy of the tied embedding that is one row off."""
    from megatron_slm.model import gpt

    initialise = gpt.initialise

    def planted(chunks: list[Any], *rest: Any, **options: Any) -> None:
        initialise(chunks, *rest, **options)
        for chunk in chunks:
            if chunk.post_process and not chunk.pre_process:
                with torch.no_grad():
                    weight = chunk.shared_embedding_or_output_weight()
                    weight.copy_(weight.roll(1, 0))

    gpt.initialise = planted


def rotary_positions_of_contiguous_cut() -> None:
    """Each cp rank rotates by the positions of a contiguous cut; where a run makes core fit the CPU, too."""
    context.rotary_part = lambda positions, axis, group: positions.chunk(group.size(), axis)[group.rank()]


def parameter_not_gathered() -> None:
    """The second replica never learns what the update has made of one weight."""
    ddp = importlib.import_module("megatron.core.distributed.distributed_data_parallel").DistributedDataParallel
    gather = ddp.start_param_sync

    def planted(self: Any, *rest: Any, **options: Any) -> None:
        struck = [param for name, param in self.module.named_parameters() if name.endswith(STALE)]
        kept = [param.detach().clone() for param in struck]
        gather(self, *rest, **options)
        for param, values in zip(struck, kept, strict=True):
            if self.dp_group.rank() == 1:
                param.data.copy_(values)

    ddp.start_param_sync = planted


OWN = (
    Fault("gradients averaged twice", "dp", (REDUCTION,), DP, gradients_averaged_twice),
    Fault(
        "balancing loss once a replica", "dp", ROUTER, DP | {"mlp": "experts"}, balancing_loss_counted_once_a_replica
    ),
    Fault(
        "tied embedding stale", "pp", (*EMBEDDING, "output_layer"), PP | {"embeddings": "tied"}, tied_embedding_stale
    ),
    Fault("parameter not gathered", "dp", (STALE.removesuffix(".weight"),), DP, parameter_not_gathered),
)
OTHERWISE: dict[str, dict[str, Any]] = {
    "rotary positions of another cut": {"plant": rotary_positions_of_contiguous_cut},
    "one bucket not reduced": {"modules": (REDUCTION,)},  # in a model this small it is the only one
}
"""Faults of the catalogue that are planted, or show, otherwise in a whole run."""
HIDDEN = (
    "router's bias by one replica's load",  # the loads of both replicas lean the same way, and only their sign is used
    "expert gradients over dense replicas",  # the run ends with an error as it saves its first checkpoint
)
"""Faults that two steps of a whole run do not show."""
BUGS = {
    fault.name: replace(fault, **OTHERWISE.get(fault.name, {})) for fault in (*OWN, *FAULTS) if fault.name not in HIDDEN
}


@dataclass(frozen=True)
class Job:
    """A layout of a model, as ``mslm train`` is told."""

    model: tuple[str, ...]
    layout: tuple[str, ...]
    ranks: int


def job_of(values: dict[str, str]) -> Job:
    """The run of some values of ``tests.axes``."""
    settings: tuple[list[str], list[str]] = [], []
    for axis, value in values.items():
        settings[axis in LAYOUT].extend(f"{key}={_text(setting)}" for key, setting in VALUES[axis][value].items())
    ranks = math.prod(int(values.get(axis, "1")) for axis in ("tp", "pp", "cp", "dp"))
    return Job((*STEPS, *settings[0]), tuple(settings[1]), ranks)


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


Plant = Callable[[], None]
