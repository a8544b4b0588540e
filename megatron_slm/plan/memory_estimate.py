"""Bytes of the fullest rank in closed form: quick enough for thousands of layouts. No torch.

The static part is exact but for the padding of buffers; activations follow the tensors that a layer of today saves
(fused attention, no score matrix), transients are the widest ones. What ``mslm memory`` traces is closer and slower:
the planner asks it about the few layouts that it shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.routing import hottest
from megatron_slm.memory.schedule import warm_up
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.layer import Shape, recomputed_layers, without_recomputation
from megatron_slm.plan.ops import ELEMENT, FP8_ELEMENT, MAIN_GRADIENT
from megatron_slm.plan.weights import Weights, chunk_split, linear_weights, stage_weights

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


def estimate(config: RunConfig, architecture: str = "hopper") -> MemoryRange:
    """The fullest pipeline stage of a configuration of ``parallel.world_size`` ranks on GPUs of an architecture."""
    layout = Layout.from_config(config.parallel, config.parallel.world_size or config.parallel.smallest_world_size)
    allocated = max(allocated_bytes(config, layout, architecture))
    hot = hottest(config)
    full = allocated if hot == 1.0 else max(allocated_bytes(config, layout, architecture, load=hot))
    beside = Surroundings(None, layout.communicators).beside(0, round(allocated)).values()
    low, expected, high = (sum(part[index] for part in beside) for index in range(3))
    return MemoryRange(allocated * (1 - ERROR) + low, allocated + expected, full * (1 + ERROR) + high)


def allocated_bytes(
    config: RunConfig, layout: Layout, architecture: str = "hopper", *, load: float = 1.0
) -> list[float]:
    """``[pipeline stage]`` -> what torch calls allocated, at the worst moment.

    Args:
        load: tokens of a rank's experts over an even share.
    """
    weights = stage_weights(config)
    found = []
    for stage in range(len(weights)):
        total = static_bytes(config, sum(weights[stage], Weights()), layout)
        total += _fp8_bytes(config, stage, architecture)
        saved = _in_flight_bytes(config, layout, stage, load)
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


def _fp8_bytes(config: RunConfig, stage: int, architecture: str) -> float:
    """Copies of the weights beside those in bf16, or in their place."""
    precision = config.precision
    if precision.fp8 is None:
        return 0.0
    # Blackwell multiplies a tensor with one scale either way; others are kept along rows and along columns.
    either_way = architecture == "blackwell" and precision.fp8_recipe in ("delayed", "tensorwise")
    copies = (1 if either_way else 2) * FP8_ELEMENT
    return float(linear_weights(config, stage) * (copies - (ELEMENT if precision.fp8_param_gather else 0)))


def layer_activation_bytes(config: RunConfig, *, moe: bool, load: float = 1.0) -> float:
    """What one layer keeps of one micro-batch for its backward pass; ``load`` as of :func:`allocated_bytes`."""
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
    narrow = element if config.precision.fp8 is None else FP8_ELEMENT
    if config.precision.fp8_recipe == "delayed" and narrow == FP8_ELEMENT:
        attention += (
            narrow * shape.tokens * heads * (model.v_head_dim if model.multi_latent_attention else model.head_dim)
        )
    # Both norms' inputs, and their outputs, which the column-parallel layers keep; a router keeps its own in bf16.
    streams = own * (2 * element * width + (narrow + (element if moe else narrow)) * width + 8)
    dropped = ("moe" if moe else "mlp") in again
    feed = 0.0 if dropped else _feed_bytes(config, shape, element, moe=moe, load=load)
    return attention + streams + feed + (own * width * 2 if model.hidden_dropout else 0)


def _feed_bytes(config: RunConfig, shape: Shape, element: int, *, moe: bool, load: float) -> float:
    """The MLP, or the experts with what is dispatched to them."""
    model = config.model
    gates = 2 if model.swiglu else 1
    narrow = element if config.precision.fp8 is None else FP8_ELEMENT
    inner = element * gates + narrow  # what the first matrix writes, and what the second one reads
    if not moe:
        return inner * shape.tokens * model.ffn_size / shape.tp
    rows = load * shape.own_tokens * model.moe_router_topk * shape.etp
    experts = rows * ((element + narrow) * model.hidden_size + inner * model.expert_ffn_size / shape.etp)
    shared = model.moe_shared_expert_intermediate_size or 0
    router = 8 * shape.own_tokens * (model.num_moe_experts or 0)
    return experts + router + inner * shape.tokens * shared / shape.tp


def _in_flight_bytes(config: RunConfig, layout: Layout, stage: int, load: float) -> float:
    """Activations of every forward pass whose backward pass is still to come, at the most."""
    parallel, train, model = config.parallel, config.train, config.model
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.vpp_size
    micro_batches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    alive = min(micro_batches * chunks, warm_up(stage, stages, chunks, micro_batches) + 1)
    sizes = [_chunk_bytes(config, layers, load) for layers in chunk_split(config)[stage]]
    shape = Shape.of(config)
    if stage == 0:
        sizes[0] += 8 * shape.tokens + (shape.own_tokens * model.hidden_size if model.hidden_dropout else 0)
    # Groups of as many micro-batches as stages go through chunk 0 first.
    group, total = stages, 0.0
    for number in range(alive):
        total += sizes[number % (group * chunks) // group] if chunks > 1 else sizes[0]
    if train.recompute_granularity == "full":
        total += _recomputed_bytes(config, load)
    return total


def _chunk_bytes(config: RunConfig, layers: range, load: float) -> float:
    """What a chunk keeps of one micro-batch; what "block" leaves out of recomputation is kept whole."""
    again, model, plain = recomputed_layers(config, layers), config.model, config
    if config.train.recompute_granularity == "full":
        plain = without_recomputation(config)
    counts = Counter((model.is_moe_layer(layer), layer in again) for layer in layers)
    return sum(
        count * layer_activation_bytes(config if twice else plain, moe=moe, load=load)
        for (moe, twice), count in counts.items()
    )


def _recomputed_bytes(config: RunConfig, load: float) -> float:
    """The one layer that full recomputation holds whole."""
    last = config.model.num_layers - 1
    return layer_activation_bytes(without_recomputation(config), moe=config.model.is_moe_layer(last), load=load)


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
