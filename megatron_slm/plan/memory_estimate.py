"""Bytes of the fullest rank in closed form: quick enough for thousands of layouts. No torch.

The static part is exact but for the padding of buffers; activations follow the tensors that a layer of today saves
(fused attention, no score matrix), transients are the widest ones. What ``mslm memory`` traces is closer and slower:
the planner asks it about the few layouts that it shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.schedule import warm_up
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.layer import Shape
from megatron_slm.plan.ops import ELEMENT, MAIN_GRADIENT
from megatron_slm.plan.weights import Weights, chunk_split, stage_weights

LOGIT_BYTES = 10
"""Of one logit at the worst moment: half precision, fp32 for the loss, its gradient."""

ERROR = 0.05
"""Of the allocated bytes, either way."""


@dataclass(frozen=True)
class MemoryRange:
    """Bytes that the GPU holds beside and for one rank; the truth is expected between ``low`` and ``high``."""

    low: float
    expected: float
    high: float

    def verdict(self, capacity_bytes: float) -> str:
        """``fits``, ``tight`` or ``does not fit``, as ``mslm memory`` says it."""
        if self.low > capacity_bytes:
            return "does not fit"
        return "fits" if self.high <= capacity_bytes else "tight"


MemoryOf = Callable[[RunConfig], MemoryRange]
"""The fullest rank of a configuration of ``parallel.world_size`` ranks."""


def estimate(config: RunConfig) -> MemoryRange:
    """The fullest pipeline stage of a configuration of ``parallel.world_size`` ranks."""
    layout = Layout.from_config(config.parallel, config.parallel.world_size or config.parallel.smallest_world_size)
    allocated = max(allocated_bytes(config, layout))
    beside = Surroundings(None, communicators(layout)).beside(0, round(allocated)).values()
    low, expected, high = (sum(part[index] for part in beside) for index in range(3))
    return MemoryRange(allocated * (1 - ERROR) + low, allocated + expected, allocated * (1 + ERROR) + high)


def allocated_bytes(config: RunConfig, layout: Layout) -> list[float]:
    """``[pipeline stage]`` -> what torch calls allocated, at the worst moment."""
    weights = stage_weights(config)
    found = []
    for stage in range(len(weights)):
        total = static_bytes(config, sum(weights[stage], Weights()), layout)
        saved = _in_flight_bytes(config, layout, stage)
        found.append(total + saved + _transient_bytes(config, last=stage == len(weights) - 1))
    return found


def static_bytes(config: RunConfig, weights: Weights, layout: Layout) -> float:
    """Weights, gradients, master weights and moments between steps (Megatron's distributed-optimizer document)."""
    half = config.precision.bf16
    in_fp32 = config.precision.accumulate_allreduce_grads_in_fp32
    held = (ELEMENT + (MAIN_GRADIENT if in_fp32 else ELEMENT)) if half else 8
    owned = 12 if half else 8
    if not config.parallel.use_distributed_optimizer:
        return float((held + owned) * weights.total)
    dense = layout.data_parallel_size * layout.context_parallel_size
    return held * weights.total + owned * (weights.dense / dense + weights.expert / layout.expert_sizes["edp"])


def layer_activation_bytes(config: RunConfig, *, moe: bool) -> float:
    """What one layer keeps of one micro-batch for its backward pass."""
    model, shape, train = config.model, Shape.of(config), config.train
    element = ELEMENT if config.precision.bf16 else 2 * ELEMENT
    own, width = shape.own_tokens, model.hidden_size
    if train.recompute_granularity == "full":
        return float(element * own * width)
    again = set(train.recompute_modules) if train.recompute_granularity == "selective" else set()
    heads = model.num_attention_heads / shape.tp
    if model.multi_latent_attention:
        keys = model.qk_head_dim + model.qk_pos_emb_head_dim
        per_token = heads * (2 * keys + 2 * model.v_head_dim)
        latent = 2 * (model.kv_lora_rank + (model.q_lora_rank or 0)) + model.qk_pos_emb_head_dim
        attention = element * (shape.tokens * per_token + own * latent)
    else:
        groups = max(model.query_groups / shape.tp, 1.0)
        attention = element * shape.tokens * model.head_dim * (2 * heads + 2 * groups)
    attention += 4 * shape.tokens * heads
    # Both norms' inputs, and their outputs, which the column-parallel layers keep.
    streams = own * (4 * element * width + 8)
    dropped = ("moe" if moe else "mlp") in again
    feed = 0.0 if dropped else _feed_bytes(config, shape, element, moe=moe)
    return attention + streams + feed + (own * width * 2 if model.hidden_dropout else 0)


def communicators(layout: Layout) -> int:
    """NCCL communicators of one rank: one for each group of several ranks, and the world."""
    sizes = [
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size * layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.world_size,
    ]
    if layout.expert_model_parallel_size > 1:
        sizes += [
            layout.expert_model_parallel_size,
            layout.expert_tp_size * layout.expert_model_parallel_size,
            layout.expert_sizes["edp"],
        ]
    return sum(size > 1 for size in sizes)


def _feed_bytes(config: RunConfig, shape: Shape, element: int, *, moe: bool) -> float:
    """The MLP, or the experts under an even load with what is dispatched to them."""
    model = config.model
    gates = 2 if model.swiglu else 1
    if not moe:
        return element * shape.tokens * (gates + 1) * model.ffn_size / shape.tp
    rows = shape.own_tokens * model.moe_router_topk * shape.etp
    experts = element * rows * (2 * model.hidden_size + (gates + 1) * model.expert_ffn_size / shape.etp)
    shared = model.moe_shared_expert_intermediate_size or 0
    router = 8 * shape.own_tokens * (model.num_moe_experts or 0)
    return experts + router + element * shape.tokens * (gates + 1) * shared / shape.tp


def _in_flight_bytes(config: RunConfig, layout: Layout, stage: int) -> float:
    """Activations of every forward pass whose backward pass is still to come, at the most."""
    parallel, train, model = config.parallel, config.train, config.model
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.vpp_size
    micro_batches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    alive = min(micro_batches * chunks, warm_up(stage, stages, chunks, micro_batches) + 1)
    kinds = {
        moe: layer_activation_bytes(config, moe=moe) for moe in {model.is_moe_layer(i) for i in range(model.num_layers)}
    }
    sizes = [sum(kinds[model.is_moe_layer(layer)] for layer in layers) for layers in chunk_split(config)[stage]]
    shape = Shape.of(config)
    if stage == 0:
        sizes[0] += 8 * shape.tokens + (shape.own_tokens * model.hidden_size if model.hidden_dropout else 0)
    # Groups of as many micro-batches as stages go through chunk 0 first.
    group, total = stages, 0.0
    for number in range(alive):
        total += sizes[number % (group * chunks) // group] if chunks > 1 else sizes[0]
    if train.recompute_granularity == "full":
        total += _recomputed_bytes(config)
    return total


def _recomputed_bytes(config: RunConfig) -> float:
    """The one layer that full recomputation holds whole."""
    plain = dataclasses.replace(config.train, recompute_granularity=None)
    whole = dataclasses.replace(config, train=plain)
    return layer_activation_bytes(whole, moe=config.model.is_moe_layer(config.model.num_layers - 1))


def _transient_bytes(config: RunConfig, *, last: bool) -> float:
    """The widest backward temporaries: weight and input gradients of the MLP's first layer; logits at the end."""
    model, shape = config.model, Shape.of(config)
    gates = 2 if model.swiglu else 1
    moe = model.is_moe_layer(model.num_layers - 1)
    ffn, tp = (model.expert_ffn_size, shape.etp) if moe else (model.ffn_size, shape.tp)
    held = (model.num_moe_experts or 1) // shape.ep if moe and config.parallel.moe_grouped_gemm else 1
    wide = 2 * ELEMENT * gates * ffn * model.hidden_size * held / tp
    if last:
        rows = model.padded_vocab_size(model.vocab_size or 1)
        return max(wide, LOGIT_BYTES * shape.tokens * rows / shape.tp) + wide / 2
    return wide + 2 * ELEMENT * shape.tokens * model.hidden_size
