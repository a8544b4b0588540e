"""A transformer layer, the embedding and the output layer as lists of operations. No torch.

What each op reads and writes follows core's modules on a GPU with Transformer Engine; :class:`Kernels` says where a
program differs (older Megatrons in published tables, for instance). Letters as in ``plan.ops``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.config import ModelConfig
from megatron_slm.plan.ops import ELEMENT, FP8_ELEMENT, MAIN_GRADIENT, Attention, Exchange, Gemm, Op, Pass, Streaming

COPIED = ELEMENT + 2 * FP8_ELEMENT
"""Bytes of an element that is copied to FP8: read once, written along the rows and along the columns."""

UNFUSED_NORM = 7
"""Bytes of a norm made of element-wise kernels, by those of one kernel: cast, square, mean, scale, cast back."""


@dataclass(frozen=True)
class Kernels:
    """What the program's kernels do. The defaults are this program's on a GPU."""

    flash_attention: bool = True
    """No score matrix is written, and the causal half is left out."""
    hides_input_gradient_exchange: bool = True
    """The exchange of a column-parallel layer's input gradient runs beside its weight gradient."""
    hides_tensor_exchange: bool = False
    """Every exchange over tp runs beside its product (Transformer Engine's user buffers)."""
    scatters_sends: bool = False
    """Without sequence parallelism each tp rank sends its share to the next stage, which gathers them over tp."""
    hides_interleaved_sends: bool = True
    """Sends of the interleaved schedule run beside the next chunk's work."""
    fused_norm: bool = True
    """A norm is one kernel; else a chain of element-wise ones in fp32."""
    accumulates_in_product: bool = False
    """Weight gradients are added to their fp32 buffer inside the product; else by a kernel of its own."""
    optimizer_bytes_per_parameter: float = 42.0
    """Read and written by the fused update of one parameter: fp32 gradient for the norm, the clipping (twice) and the
    update, master weight and moments (each twice), the half-precision weight."""
    gradient_bytes: int = 4
    """Of one element in the reduction over data-parallel ranks."""
    fp8: bool = False
    """Linear layers multiply in FP8, but for the router and the output layer."""

    def in_bf16(self) -> Kernels:
        """The same where FP8 does not reach."""
        return dataclasses.replace(self, fp8=False)


@dataclass(frozen=True)
class Shape:
    """Sizes on one rank."""

    tokens: int
    """T: tokens of a micro-batch on this rank before sequence parallelism."""
    own_tokens: int
    """Those outside attention and MLP: T / tp with sequence parallelism."""
    tp: int
    cp: int
    ep: int
    etp: int
    sequence_parallel: bool
    interleaved: bool

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        """The sizes of a configuration."""
        parallel = config.parallel
        tokens = config.model.seq_length * config.train.micro_batch_size // parallel.context_parallel_size
        tp, divided = parallel.tensor_model_parallel_size, parallel.sequence_parallel
        return cls(
            tokens=tokens,
            own_tokens=tokens // tp if divided else tokens,
            tp=tp,
            cp=parallel.context_parallel_size,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tp_size,
            sequence_parallel=divided,
            interleaved=parallel.vpp_size > 1,
        )


class Linear(NamedTuple):
    """A linear layer: its product, the gradients of input and weight, and what adds up the latter.

    In FP8 its input, and the gradient of its output, are copied first.
    """

    product: Gemm
    dgrad: Gemm
    wgrad: Gemm
    accumulation: tuple[Streaming, ...]
    copied: tuple[Streaming, ...] = ()
    gradient_copied: tuple[Streaming, ...] = ()


def layer_pass(config: RunConfig, *, moe: bool, kernels: Kernels) -> Pass:
    """Forward and backward of one layer, with what ``train.recompute_*`` runs twice."""
    shape, train, model = Shape.of(config), config.train, config.model
    core = core_attention(model, shape, kernels)
    if shape.cp > 1:
        core = _context_exchange(config, shape) + core
    feed = experts_pass(model, shape, kernels) if moe else mlp_pass(model, shape, model.ffn_size, kernels)
    if train.recompute_granularity == "selective":
        again = set(train.recompute_modules)
        core = core.recomputed() if "core_attn" in again else core
        feed = feed.recomputed() if ("moe" if moe else "mlp") in again else feed
    inputs, projection = attention_projections(model, shape, kernels)
    layer = norm_pass(model, shape, kernels) + inputs + core + projection + residual_pass(model, shape)
    layer = layer + norm_pass(model, shape, kernels) + feed + residual_pass(model, shape)
    return layer.recomputed() if train.recompute_granularity == "full" else layer


def recomputed_layers(config: RunConfig, layers: range) -> range:
    """Those of a chunk's layers that are recomputed whole: core's "block" takes the first few."""
    train = config.train
    if train.recompute_granularity != "full":
        return layers[:0]
    return layers[: train.recompute_num_layers] if train.recompute_method == "block" else layers


def without_recomputation(config: RunConfig) -> RunConfig:
    """The same, of a layer that "block" leaves out."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute_granularity=None))


def linear(name: str, m: int, n: int, k: int, kernels: Kernels, count: int = 1) -> Linear:
    """A linear layer of ``n`` x ``k`` weights over ``m`` tokens, ``count`` times."""
    fused, fp8 = kernels.accumulates_in_product, kernels.fp8
    added = () if fused else (Streaming(f"{name} accumulation", float(count * n * k * (ELEMENT + 2 * MAIN_GRADIENT))),)
    return Linear(
        Gemm(name, m, n, k, count, fp8=fp8),
        Gemm(f"{name} dgrad", m, k, n, count, fp8=fp8),
        Gemm(f"{name} wgrad", n, k, m, count, accumulates=fused, fp8=fp8),
        added,
        (Streaming(f"{name} input in FP8", float(count * m * k * COPIED)),) if fp8 else (),
        (Streaming(f"{name} gradient in FP8", float(count * m * n * COPIED)),) if fp8 else (),
    )


def column_parallel(name: str, n: int, k: int, shape: Shape, kernels: Kernels) -> Pass:
    """A linear layer whose ``n`` outputs are divided over tp."""
    product, dgrad, wgrad, added, copied, back = linear(name, shape.tokens, n // shape.tp, k, kernels)
    if shape.tp == 1:
        return Pass((*copied, product), (*back, dgrad, wgrad, *added))
    full = float(ELEMENT * shape.tokens * k)
    behind = wgrad if kernels.hides_input_gradient_exchange else None
    if not shape.sequence_parallel:
        exchange = Exchange(f"{name} dgrad", "all_reduce", "tp", full, behind)
        return Pass((*copied, product), (*back, dgrad, exchange, wgrad, *added))
    inputs = float((FP8_ELEMENT if kernels.fp8 else ELEMENT) * shape.tokens * k)
    gather = Exchange(f"{name} input", "all_gather", "tp", inputs, product if kernels.hides_tensor_exchange else None)
    again = Exchange(f"{name} input again", "all_gather", "tp", inputs, dgrad if behind else None)
    return Pass(
        (*copied, gather, product),
        (*back, again, dgrad, Exchange(f"{name} dgrad", "reduce_scatter", "tp", full, behind), wgrad, *added),
    )


def row_parallel(name: str, n: int, k: int, shape: Shape, kernels: Kernels) -> Pass:
    """A linear layer whose ``k`` inputs are divided over tp."""
    product, dgrad, wgrad, added, copied, back = linear(name, shape.tokens, n, k // shape.tp, kernels)
    if shape.tp == 1:
        return Pass((*copied, product), (*back, dgrad, wgrad, *added))
    full = float(ELEMENT * shape.tokens * n)
    if not shape.sequence_parallel:
        exchange = Exchange(f"{name} output", "all_reduce", "tp", full)
        return Pass((*copied, product, exchange), (*back, dgrad, wgrad, *added))
    hidden = kernels.hides_tensor_exchange
    scatter = Exchange(f"{name} output", "reduce_scatter", "tp", full, product if hidden else None)
    gradient = float((FP8_ELEMENT if kernels.fp8 else ELEMENT) * shape.tokens * n)
    gather = Exchange(f"{name} gradient", "all_gather", "tp", gradient, dgrad if hidden else None)
    return Pass((*copied, product, scatter), (*back, gather, dgrad, wgrad, *added))


def replicated(name: str, m: int, n: int, k: int, kernels: Kernels) -> Pass:
    """A linear layer that every tp rank holds whole, over ``m`` tokens."""
    product, dgrad, wgrad, added, copied, back = linear(name, m, n, k, kernels)
    return Pass((*copied, product), (*back, dgrad, wgrad, *added))


def streaming(name: str, forward: float, backward: float) -> Pass:
    """An element-wise op by its bytes."""
    return Pass((Streaming(name, forward),), (Streaming(f"{name} backward", backward),))


def norm_pass(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """Read and write; backward reads input and gradient, writes one."""
    size = ELEMENT * shape.own_tokens * model.hidden_size * (1 if kernels.fused_norm else UNFUSED_NORM)
    return streaming("norm", 2.0 * size, 3.0 * size)


def residual_pass(model: ModelConfig, shape: Shape) -> Pass:
    """Output + residual, with dropout's mask where there is one; backward adds the two gradients."""
    size = ELEMENT * shape.own_tokens * model.hidden_size
    mask = size / ELEMENT if model.hidden_dropout else 0.0
    return streaming("residual", 3.0 * size + mask, 3.0 * size + (2.0 * size + mask if mask else 0.0))


def attention_projections(model: ModelConfig, shape: Shape, kernels: Kernels) -> tuple[Pass, Pass]:
    """What makes queries, keys and values of the normed input, and what projects the output."""
    heads, width = model.num_attention_heads, model.hidden_size
    if not model.multi_latent_attention:
        joint = (heads + 2 * model.query_groups) * model.head_dim
        inputs = column_parallel("qkv", joint, width, shape, kernels)
        if model.position_embedding_type == "rope":
            rotated = ELEMENT * shape.tokens * (heads + model.query_groups) * model.head_dim / shape.tp
            inputs = inputs + streaming("rope", 2 * rotated, 2 * rotated)
        return inputs, row_parallel("projection", width, heads * model.head_dim, shape, kernels)
    return _latent_inputs(model, shape, kernels), row_parallel(
        "projection", width, heads * model.v_head_dim, shape, kernels
    )


def core_attention(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """Scores, softmax and the weighted sum of values, causal, of this rank's queries and heads."""
    heads, length = model.num_attention_heads / shape.tp, model.seq_length
    keys, values = _head_widths(model)
    read = ELEMENT * shape.tokens * heads * (keys + values) * 2
    products = 2.0 * shape.tokens * length * heads * (keys + values)
    if kernels.flash_attention:
        # Backward has five products for forward's two, the scores again among them.
        return Pass(
            (Attention("attention", products / 2, read),),
            (Attention("attention backward", products / 2 * 2.5, 2 * read),),
        )
    count = heads * shape.tokens / length
    scores = ELEMENT * shape.tokens * length * heads
    dropout = 2.5 * scores if model.attention_dropout else 0.0
    forward: Sequence[Op] = (
        Gemm("scores", length, length, keys, count),
        Streaming("softmax", 2 * scores + dropout),
        Gemm("values", length, values, length, count),
    )
    backward: Sequence[Op] = (
        Gemm("values dgrad", length, length, values, count),
        Gemm("scores dgrad", length, values, length, count),
        Streaming("softmax backward", 3 * scores + dropout),
        Gemm("queries", length, keys, length, count),
        Gemm("keys", length, keys, length, count),
    )
    return Pass(tuple(forward), tuple(backward))


def mlp_pass(model: ModelConfig, shape: Shape, width: int, kernels: Kernels) -> Pass:
    """The MLP with ``width`` inner channels (of one half, when gated)."""
    gates = 2 if model.swiglu else 1
    inner = ELEMENT * shape.tokens * width / shape.tp
    return (
        column_parallel("fc1", gates * width, model.hidden_size, shape, kernels)
        + streaming("activation", (gates + 1) * inner, (2 * gates + 1) * inner)
        + row_parallel("fc2", model.hidden_size, width, shape, kernels)
    )


def experts_pass(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """Router, dispatch, this rank's experts under an even load, combine, and the shared expert."""
    width, topk, experts = model.hidden_size, model.moe_router_topk, model.num_moe_experts or 1
    gates = 2 if model.swiglu else 1
    held = experts // shape.ep
    sent = shape.own_tokens * topk
    rows = sent * shape.etp
    moved = float(ELEMENT * sent * width)
    inner = ELEMENT * rows * model.expert_ffn_size / shape.etp
    per_expert = max(1, rows // held)
    result = replicated("router", shape.own_tokens, experts, width, kernels.in_bf16())
    result = result + streaming("permute", 2 * moved, 2 * moved) + _dispatch("dispatch", moved, rows, width, shape)
    for name, n, k in (
        ("expert fc1", gates * model.expert_ffn_size // shape.etp, width),
        ("expert fc2", width, model.expert_ffn_size // shape.etp),
    ):
        product, dgrad, wgrad, added, copied, back = linear(name, per_expert, n, k, kernels, held)
        result = result + Pass((*copied, product), (*back, dgrad, wgrad, *added))
        if name == "expert fc1":
            result = result + streaming("expert activation", (gates + 1) * inner, (2 * gates + 1) * inner)
    result = result + _dispatch("combine", moved, rows, width, shape) + streaming("unpermute", 2 * moved, 2 * moved)
    if model.moe_shared_expert_intermediate_size:
        result = result + mlp_pass(model, shape, model.moe_shared_expert_intermediate_size, kernels)
    return result


def embedding_pass(model: ModelConfig, shape: Shape) -> Pass:
    """Rows read and written; backward adds gradients to an fp32 buffer. Partial rows are summed over tp."""
    size = float(ELEMENT * shape.tokens * model.hidden_size)
    result = streaming("embedding", 2 * size, 5 * size)
    if shape.tp > 1:
        collective = "reduce_scatter" if shape.sequence_parallel else "all_reduce"
        back = (Exchange("embedding gradient", "all_gather", "tp", size),) if shape.sequence_parallel else ()
        result = result + Pass((Exchange("embedding", collective, "tp", size),), back)
    return result


def head_pass(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """Final norm, output layer and cross entropy over the vocabulary's share."""
    rows = model.padded_vocab_size(model.vocab_size or 1)
    logits = shape.tokens * rows / shape.tp
    result = norm_pass(model, shape, kernels) + column_parallel(
        "logits", rows, model.hidden_size, shape, kernels.in_bf16()
    )
    # Forward: read, cast to fp32, maximum, exponentials in place, sum; backward: scale and cast in one read and write.
    result = result + streaming("cross entropy", 22 * logits, 8 * logits)
    if shape.tp > 1:
        # Maximum, the target's logit, the sum: three small exchanges in fp32.
        result = result + Pass((Exchange("cross entropy", "all_reduce", "tp", 4.0 * shape.tokens, times=3),))
    return result


def prediction_pass(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """What one depth of multi-token prediction has beside its layer and its output layer."""
    return (
        embedding_pass(model, shape)
        + norm_pass(model, shape, kernels)
        + norm_pass(model, shape, kernels)
        + column_parallel("prediction", model.hidden_size, 2 * model.hidden_size, shape, kernels)
    )


def _latent_inputs(model: ModelConfig, shape: Shape, kernels: Kernels) -> Pass:
    """Multi-latent attention: replicated down projections, up projections divided over tp."""
    width, heads = model.hidden_size, model.num_attention_heads
    queries = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    up = heads * (model.qk_head_dim + model.v_head_dim)
    if model.q_lora_rank is None:
        result = column_parallel("q", queries, width, shape, kernels)
    else:
        result = replicated("q down", shape.own_tokens, model.q_lora_rank, width, kernels)
        result = result + column_parallel("q up", queries, model.q_lora_rank, shape, kernels)
    latent = model.kv_lora_rank + model.qk_pos_emb_head_dim
    result = result + replicated("kv down", shape.own_tokens, latent, width, kernels)
    result = result + column_parallel("kv up", up, model.kv_lora_rank, shape, kernels)
    if shape.sequence_parallel and shape.tp > 1:
        # The rotary part of the keys is one head that every rank needs for all tokens.
        positions = float(ELEMENT * shape.tokens * model.qk_pos_emb_head_dim)
        gather, scatter = (
            (Exchange("rotary keys", collective, "tp", positions),) for collective in ("all_gather", "reduce_scatter")
        )
        result = result + Pass(gather, scatter)
    moved = ELEMENT * shape.tokens * (2 * queries + up) / shape.tp
    return result + streaming("rope", 2 * moved, 2 * moved)


def _head_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels of a query/key head and of a value head."""
    if model.multi_latent_attention:
        return model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
    return model.head_dim, model.head_dim


def _context_exchange(config: RunConfig, shape: Shape) -> Pass:
    """Keys and values of the other cp ranks: a ring beside the attention of each block, or gathered at once."""
    model, keys_values = config.model, sum(_head_widths(config.model))
    groups = model.num_attention_heads if model.multi_latent_attention else model.query_groups
    local = ELEMENT * shape.tokens * max(1.0, groups / shape.tp) * keys_values
    if config.parallel.cp_comm_type == "all_gather":
        whole = local * shape.cp
        gather = Exchange("keys and values", "all_gather", "cp", whole)
        scatter = Exchange("gradients of keys and values", "reduce_scatter", "cp", whole)
        return Pass((gather,), (gather, scatter))
    core = core_attention(model, shape, Kernels())
    block, back = core.forward[0], core.backward[0]
    if not isinstance(block, Attention) or not isinstance(back, Attention):
        raise TypeError("flash attention is one kernel a pass")
    steps = shape.cp - 1
    part, back_part = (Attention(whole.name, whole.flops / shape.cp, whole.bytes) for whole in (block, back))
    return Pass(
        (Exchange("keys and values", "send", "cp", local, part, times=steps),),
        # Backward sends the keys and values again, and their gradients along with them.
        (Exchange("keys, values and gradients", "send", "cp", 2 * local, back_part, times=steps),),
    )


def _dispatch(name: str, moved: float, rows: int, width: int, shape: Shape) -> Pass:
    """Tokens to their experts' ranks, or back; with etp every rank of an expert gets them all."""
    ops: list[Op] = []
    if shape.ep > 1:
        ops.append(Exchange(name, "all_to_all", "ep", moved))
    if shape.etp > 1:
        collective = "all_gather" if name == "dispatch" else "reduce_scatter"
        ops.append(Exchange(name, collective, "etp", float(ELEMENT * rows * width)))
    back = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
    backward = [
        Exchange(op.name, back.get(op.collective, op.collective), op.axis, op.bytes)
        for op in reversed(ops)
        if isinstance(op, Exchange)
    ]
    return Pass(tuple(ops), tuple(backward))
