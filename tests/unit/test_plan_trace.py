"""The planner's closed forms against the real modules in the dry world: one layer more, op for op."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel.device import preload
from megatron_slm.plan.layer import Kernels, layer_pass
from megatron_slm.plan.ops import Exchange, Op, Streaming

COLLECTIVES = {
    "c10d._allgather_base_": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.allreduce_": "all_reduce",
    "c10d.alltoall_base_": "all_to_all",
}

SEQUENCE = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
FP8 = ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]
FULL = ["train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1"]
CASES = {
    "sequence parallel": SEQUENCE,
    "tensor parallel, MLP recomputed": [
        "parallel.tensor_model_parallel_size=2", "train.recompute_granularity=selective", "train.recompute_modules=mlp",
    ],
    "full recomputation": [*SEQUENCE, *FULL],
    "experts": ["model.num_moe_experts=8", "model.moe_ffn_hidden_size=256", "parallel.expert_model_parallel_size=4"],
    "sequence parallel, FP8": [*SEQUENCE, *FP8],
    "full recomputation, FP8": [*SEQUENCE, *FULL, *FP8],
    "latent attention": [
        "model.multi_latent_attention=true", "model.q_lora_rank=128", "model.kv_lora_rank=64", "model.qk_head_dim=32",
        "model.qk_pos_emb_head_dim=16", "model.v_head_dim=32", *SEQUENCE,
    ],
}  # fmt: skip


def config_of(layers: int, tokens: list[str]) -> RunConfig:
    shape = [f"model.num_layers={layers}", "model.hidden_size=512", "model.num_attention_heads=8"]
    attention = [] if any("latent" in token for token in tokens) else ["model.num_query_groups=4"]
    shape += ["model.ffn_hidden_size=1024", "model.vocab_size=1024", "model.seq_length=1024", *attention]
    return load(
        None, [*shape, "parallel.world_size=8", "precision.bf16=true", "train.global_batch_size=8", *tokens]
    ).config


@functools.cache
def traced(layers: int, case: str) -> dict[str, Counter[str]]:
    """Pass -> FLOPs of products and bytes of every collective in it, of the real modules."""
    preload("cpu")
    from megatron_slm.run_dry import job_trace

    trace = job_trace(config_of(layers, CASES[case]), 0, world_size=8, for_gpu=True)
    found: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    for phase, counts in found.items():
        for op in trace.phases[phase, 0].ops:
            if op.kind == "gemm":
                counts["flops"] += int(op.flops)
            elif op.name in COLLECTIVES:
                counts[COLLECTIVES[op.name]] += op.moved_bytes
    return found


def planned(ops: tuple[Op, ...]) -> Counter[str]:
    """The same of the planner's list."""
    found: Counter[str] = Counter()
    for op in ops:
        if isinstance(op, Exchange):
            found[op.collective] += int(op.bytes * op.times)
        elif not isinstance(op, Streaming):
            found["flops"] += int(op.flops)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_layer_does_what_the_modules_do(case: str, phase: str) -> None:
    layer = traced(3, case)[phase] - traced(2, case)[phase]
    kernels = Kernels(fp8=case.endswith("FP8"))
    mine = planned(getattr(layer_pass(config_of(2, CASES[case]), moe=case == "experts", kernels=kernels), phase))
    if case == "experts":  # the numbers of tokens are exchanged too, some kilobytes
        assert 0 <= layer["all_to_all"] - mine["all_to_all"] <= 10_000
        layer["all_to_all"] = mine["all_to_all"]
    assert mine == layer
