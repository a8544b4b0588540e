"""Rules about FP8: what Transformer Engine's products and core's parameters in FP8 take."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts
from megatron_slm.config.run_config import RunConfig

FP8, RECIPE, GATHER = "precision.fp8", "precision.fp8_recipe", "precision.fp8_param_gather"
TP = "parallel.tensor_model_parallel_size"


def options(facts: Facts) -> Iterator[str]:
    """FP8 stands on bf16 and on a GPU, and its options belong to it."""
    own = facts.config.precision
    if own.fp8 is None:
        for key in (RECIPE, GATHER):
            if facts.is_set(key):
                yield f"{facts.cite(key, FP8)}: the former belongs to FP8 and would be ignored. Set {FP8}=hybrid."
        return
    if not own.bf16:
        yield f"{facts.cite(FP8, 'precision.bf16')}: what is not in FP8 is in bf16. Set precision.bf16=true."
    if facts.config.parallel.device == "cpu":
        yield (
            f"{facts.cite(FP8, 'parallel.device')}: Transformer Engine multiplies in FP8 on a GPU alone. Leave {FP8} "
            "out, or set parallel.device=cuda."
        )


def parameters(facts: Facts) -> Iterator[str]:
    """Parameters in FP8 belong to the distributed optimizer."""
    own, parallel, sharded = facts.config.precision, facts.config.parallel, "parallel.use_distributed_optimizer"
    if own.fp8 is None or not own.fp8_param_gather:
        return
    if not parallel.use_distributed_optimizer:
        yield (
            f"{facts.cite(GATHER, sharded)}: the weights' values in full are those of the distributed optimizer. Set "
            f"{sharded}=true."
        )
    if own.fp8_recipe == "mxfp8":
        yield (
            f"{facts.cite(GATHER, RECIPE)}: core gathers such weights in bf16 through the gradients' buffer, which is "
            f"not built here. Leave {GATHER} out, or choose another recipe."
        )


def sizes(facts: Facts) -> Iterator[str]:
    """Every side of a product is a multiple of 16, of 32 with mxfp8 (TE 2.11 ``cublaslt_gemm.cu``: ``lda % 16``)."""
    own = facts.config.precision
    if own.fp8 is None:
        return
    multiple = 32 if own.fp8_recipe == "mxfp8" else 16
    for keys, what, size in product_sides(facts.config):
        if size % multiple:
            yield f"{facts.cite(*keys, RECIPE)}: {what} are {size:g} on a rank, and FP8 takes multiples of {multiple}."


def product_sides(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """The keys behind a side of a product, what it is, and how many a rank has of it."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    tokens = model.seq_length * config.train.micro_batch_size / parallel.context_parallel_size
    tokens /= tp if parallel.sequence_parallel else 1
    yield ("model.seq_length", "train.micro_batch_size"), "the tokens of a micro-batch", tokens
    yield ("model.hidden_size",), "the channels", model.hidden_size
    heads = model.num_attention_heads
    if model.multi_latent_attention:
        latent = model.kv_lora_rank + model.qk_pos_emb_head_dim
        yield ("model.kv_lora_rank", "model.qk_pos_emb_head_dim"), "the latent of keys and values", latent
        yield ("model.kv_lora_rank",), "the latent", model.kv_lora_rank
        yield ("model.v_head_dim", TP), "the channels of all heads", heads * model.v_head_dim / tp
        if model.q_lora_rank is not None:
            yield ("model.q_lora_rank",), "the latent of queries", model.q_lora_rank
    else:
        joint = (heads + 2 * model.query_groups) * model.head_dim
        yield ("model.num_query_groups", TP), "the joint channels of queries, keys and values", joint / tp
        yield ("model.num_attention_heads", TP), "the channels of all heads", heads * model.head_dim / tp
    if not all(model.is_moe_layer(layer) for layer in range(model.num_layers)):
        yield ("model.ffn_hidden_size", TP), "the inner channels of the MLP", model.ffn_size / tp
    if model.num_moe_experts is not None:
        width = model.expert_ffn_size / parallel.expert_tp_size
        yield ("model.moe_ffn_hidden_size", TP), "the inner channels of an expert", width
    if shared := model.moe_shared_expert_intermediate_size:
        yield ("model.moe_shared_expert_intermediate_size", TP), "the inner channels of the shared expert", shared / tp


RULES = (options, parameters, sizes)
