"""Static memory of a Megatron rank in closed form: what the dry world's figures are checked against.

State: elements of every parameter by the shapes of core 0.16.1's modules, with the padding of its gradient buffers
(``distributed/param_and_grad_buffer.py``). Kept: what Megatron and its libraries hold between steps besides, every
size with its source. Symbols: h width, a heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.layout import chunk_layers, split_layers
from tests.bench.published import Case

MIB = 1 << 20
ALIGNMENT = 64
"""Elements to whose multiple a parameter's start in a buffer is rounded up."""
GROUPED_STREAMS = 4
"""Streams, each with a workspace, of TE's grouped matrix product (``get_num_cublas_streams``)."""


class State(NamedTuple):
    """Bytes of one rank between steps."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


class Tensors(NamedTuple):
    """Elements of the parameters of one model chunk on one rank, in the order of the modules."""

    dense: list[int]
    experts: list[int]


def state_of(config: RunConfig, stage: int, world_size: int) -> State:
    """What a rank of pipeline stage ``stage`` holds of its model."""
    parallel = config.parallel
    sizes = {
        "dense": world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size),
        "experts": world_size
        // (parallel.expert_tp_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size),
    }
    half, full = (2, 4) if config.precision.bf16 else (4, 4)
    wide = config.precision.accumulate_allreduce_grads_in_fp32 or not config.precision.bf16
    gradient = full if wide else half
    # Master weight and two moments; with 16-bit gradients the optimizer keeps a copy of them in fp32. Parameters in
    # fp32 are their own master weights.
    update = (12 if config.precision.bf16 else 8) + (0 if wide else 4)
    state = State(0, 0, 0)
    for chunk in range(parallel.vpp_size):
        for kind, elements in chunk_tensors(config, stage, chunk)._asdict().items():
            shards = sizes[kind] if parallel.use_distributed_optimizer else 1
            held = padded(elements, shards) if parallel.use_distributed_optimizer else sum(elements)
            state = State(
                state.parameters + half * held,
                state.gradients + gradient * held,
                state.optimizer + update * held // shards,
            )
    return state


def padded(elements: list[int], shards: int) -> int:
    """Elements of a buffer: every parameter begins at a multiple of 64, the end is one of lcm(shards, 128)."""
    end = 0
    for count in elements:
        end = _rounded(end, ALIGNMENT) + count
    return _rounded(end, math.lcm(shards, 128))


def chunk_tensors(config: RunConfig, stage: int, chunk: int) -> Tensors:
    """The parameters of one model chunk of one rank."""
    model, parallel = config.model, config.parallel
    stages, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    dense, experts = [], []
    layers, depths = chunk_of(config, stage, chunk)
    begins, ends = stage == chunk == 0, stage == stages - 1 and chunk == parallel.vpp_size - 1
    table = model.padded_vocab_size(model.vocab_size or 0) * model.hidden_size // tp
    if begins or depths:
        dense.append(table)
    if begins and model.position_embedding_type == "learned_absolute":
        dense.append(model.position_limit * model.hidden_size)
    for layer in layers:
        dense += attention(model, tp)
        dense += [*norm(model, model.hidden_size), *feed_forward(model, layer, tp)]
        experts += experts_of(config, layer)
    if ends:
        dense += norm(model, model.hidden_size)
        dense += [*norm(model, model.hidden_size) * 3, 2 * model.hidden_size**2 // tp] * depths
        if (model.untie_embeddings_and_output_weights or stages > 1) and not _shares_table(model):
            dense.append(table)
    return Tensors(dense, experts)


def chunk_of(config: RunConfig, stage: int, chunk: int) -> tuple[list[int], int]:
    """Layers of a chunk, counted from 0, the last one again for each depth of prediction; and those depths."""
    model, parallel = config.model, config.parallel
    split = split_layers(
        model.num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        embedding_counts=parallel.account_for_embedding_in_pipeline_split,
        loss_counts=parallel.account_for_loss_in_pipeline_split,
    )
    ends = stage == parallel.pipeline_model_parallel_size - 1 and chunk == parallel.vpp_size - 1
    depths = model.mtp_num_layers or 0 if ends else 0
    return [*chunk_layers(split, stage, chunk), *[model.num_layers - 1] * depths], depths


def experts_of(config: RunConfig, layer: int) -> list[int]:
    """Matrices and biases of the experts that a rank holds of a layer."""
    model, parallel = config.model, config.parallel
    if not model.is_moe_layer(layer):
        return []
    count = (model.num_moe_experts or 0) // parallel.expert_model_parallel_size
    return mlp(model, model.expert_ffn_size, parallel.expert_tp_size) * count


def _shares_table(model: ModelConfig) -> bool:
    """Multi-token prediction brings the embedding to the last stage; a tied output layer uses it."""
    return bool(model.mtp_num_layers) and not model.untie_embeddings_and_output_weights


def norm(model: ModelConfig, width: int) -> list[int]:
    """Weight, and bias of a LayerNorm."""
    return [width] * (2 if model.normalization == "LayerNorm" else 1)


def attention(model: ModelConfig, tp: int) -> list[int]:
    """Norm, projections and biases of one attention."""
    width, heads = model.hidden_size, model.num_attention_heads
    bias = [width] if model.add_bias_linear else []
    if model.multi_latent_attention:
        return [heads * model.v_head_dim * width // tp, *bias, *_latent(model, tp), *norm(model, width)]
    rows = model.head_dim * (heads + 2 * model.query_groups) // tp
    qkv = [rows * width, *([rows] if model.add_bias_linear or model.add_qkv_bias else [])]
    heads_norm = norm(model, model.head_dim) * 2 if model.qk_layernorm else []
    return [width * heads * model.head_dim // tp, *bias, *norm(model, width), *qkv, *heads_norm]


def _latent(model: ModelConfig, tp: int) -> list[int]:
    """Down and up projections of MLA; every tp rank holds the down ones whole."""
    width, heads, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    queries = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim) // tp
    down = width * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim) // tp
    norms = [*norm(model, model.kv_lora_rank), *(norm(model, rank) if rank else [])] if model.qk_layernorm else []
    return [*([width * rank, rank * queries] if rank else [width * queries]), down, up, *norms]


def feed_forward(model: ModelConfig, layer: int, tp: int) -> list[int]:
    """MLP, or router and shared expert: what is not divided over ep."""
    if not model.is_moe_layer(layer):
        return mlp(model, model.ffn_size, tp)
    shared = model.moe_shared_expert_intermediate_size
    gate = [model.hidden_size] if shared and model.moe_shared_expert_gate else []
    return [model.hidden_size * (model.num_moe_experts or 0), *(mlp(model, shared, tp) if shared else []), *gate]


def mlp(model: ModelConfig, width: int, tp: int) -> list[int]:
    """Both matrices of an MLP of ``width``, with biases."""
    columns = width * (2 if model.swiglu else 1) // tp
    first = [model.hidden_size * columns, *([columns] if model.add_bias_linear else [])]
    return [*first, model.hidden_size * width // tp, *([model.hidden_size] if model.add_bias_linear else [])]


def kept_bytes(case: Case) -> dict[str, int]:
    """What a rank of Megatron's last stage holds between steps beside its state, by what it is."""
    parallel, hopper = case.config.parallel, "A100" not in case.gpu
    found = {"cuBLAS workspaces of torch": 2 * torch_workspace(case.gpu, deterministic=case.target.deterministic)}
    if case.target.engine == "te":
        # TransformerEngine v2.8 pytorch/module/base.py: get_cublas_workspace_size_bytes, and one for each stream.
        count = 1 + (GROUPED_STREAMS if parallel.moe_grouped_gemm else 0)
        found["cuBLAS workspaces of TE"] = count * (32 if hopper else 4) * MIB
    if shared := shared_buffer(case):
        found["core's global memory buffer"] = shared
    if case.target.fp8:
        found["FP8 copies of weights"] = fp8_copies(case)
    return found


def torch_workspace(gpu: str, *, deterministic: bool) -> int:
    """Of one handle: the main thread and autograd's have one each (torch ``cuda/CublasHandlePool.cpp``).

    By default :4096:2:16:8 KiB, on Hopper 32 MiB; CUBLAS_WORKSPACE_CONFIG=:4096:8 of the deterministic tests is 32 MiB.
    """
    return 32 * MIB if deterministic or "H100" in gpu or "H200" in gpu else (8192 + 128) << 10


def shared_buffer(case: Case) -> int:
    """Bytes of the buffer "mpu" of ``parallel_state.get_global_memory_buffer``, which grows to the largest request."""
    return max(_requests(case), default=0)


def _requests(case: Case) -> Iterator[int]:
    config = case.config
    model, parallel, batch = config.model, config.parallel, config.train.micro_batch_size
    length = model.seq_length // parallel.context_parallel_size
    element = 2 if config.precision.bf16 else 4
    if parallel.sequence_parallel:  # tensor_parallel/layers.py: output layer and prediction gather their inputs
        yield length * batch * model.hidden_size * element * (2 if model.mtp_num_layers else 1)
    if case.target.engine == "core":  # transformer/dot_product_attention.py: scores
        yield batch * model.num_attention_heads // parallel.tensor_model_parallel_size * length**2 * element


def fp8_copies(case: Case) -> int:
    """TE keeps a row-wise and a column-wise FP8 copy of every linear weight of the layers.

    Blackwell multiplies either; of a tensor scaled as a whole it keeps one.
    """
    config = case.config
    model, parallel = config.model, config.parallel
    stage = parallel.pipeline_model_parallel_size - 1
    tensors: list[int] = []
    for chunk in range(parallel.vpp_size):
        layers, depths = chunk_of(config, stage, chunk)
        for layer in layers:
            tensors += attention(model, parallel.tensor_model_parallel_size)
            tensors += experts_of(config, layer)
            width = model.moe_shared_expert_intermediate_size if model.is_moe_layer(layer) else model.ffn_size
            tensors += mlp(model, width or 0, parallel.tensor_model_parallel_size)
        tensors += [2 * model.hidden_size**2 // parallel.tensor_model_parallel_size] * depths
    # Norms and biases are shorter than any matrix.
    elements = sum(count for count in tensors if count > 16 * model.hidden_size)
    return elements * (1 if "B200" in case.gpu and case.target.fp8 != "mxfp8" else 2)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
