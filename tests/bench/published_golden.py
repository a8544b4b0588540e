"""Rows of NVIDIA/Megatron-LM's functional tests (tag core_v0.16.1): Megatron's command line -> our configuration.

Their memory, ``mem-allocated-bytes`` (static) and ``mem-max-allocated-bytes`` (peak), is written by the last rank.
Defaults, and what is derived from them, are those of ``megatron/training/arguments.py`` at that tag.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from megatron_slm.config.keys import flag_table
from megatron_slm.errors import ConfigError
from tests.bench.published import Case, NotCovered, Row, Target
from tests.bench.published_static import kept_bytes, state_of

CI_GPUS = 8
TOKENIZERS: Mapping[str, int] = {"GPTSentencePieceTokenizer": 256_000, "Llama2Tokenizer": 32_000}
"""Flag ``tokenizer-type`` of a release run -> entries of the file that its model_config.yaml names."""

NOT_OURS: Mapping[str, str] = {
    "use-megatron-fsdp": "Megatron FSDP is not offered",
    "use-torch-fsdp2": "torch FSDP2 is not offered",
    "data-parallel-sharding-strategy": "Megatron FSDP is not offered",
    "cuda-graph-impl": "CUDA graphs, which keep pools of their own, are not offered",
    "enable-cuda-graph": "CUDA graphs, which keep pools of their own, are not offered",
    "external-cuda-graph": "CUDA graphs, which keep pools of their own, are not offered",
    "pipeline-model-parallel-layout": "an uneven layout of interleaved chunks is not offered",
    "fine-grained-activation-offloading": "offloading of activations is not offered",
    "hybrid-override-pattern": "state-space layers are not offered",
    "is-hybrid-model": "state-space layers are not offered",
    "experimental-attention-variant": "linear attention is not offered",
    "linear-attention-freq": "linear attention is not offered",
    "attention-output-gate": "a gate behind the attention is not offered",
    "export-kd-cfg": "distillation is not offered",
    "export-te-mcore-model": "distillation is not offered",
    "fp8-param-gather": "weights kept in FP8 alone are not offered",
    "moe-enable-deepep": "DeepEP is not offered",
    "spec": "a layer of another file is not offered",
}
"""Flag -> why a row with it is not covered."""

SUPPORTED: Mapping[str, str] = {
    "transformer-impl": "target: engine",
    "attention-backend": "target: attention",
    "use-flash-attn": "target: attention",
    "cross-entropy-loss-fusion": "target: loss",
    "cross-entropy-fusion-impl": "target: loss",
    "fp8-format": "target: FP8 recipe",
    "fp8-recipe": "target: FP8 recipe",
    "fp8-amax-history-len": "target: FP8 recipe",
    "fp8-amax-compute-algo": "target: FP8 recipe",
    "first-last-layers-bf16": "target: FP8 recipe",
    "fp16": "target: fp16",
    "deterministic-mode": "target: deterministic",
    "squared-relu": "stand-in",
    "apply-layernorm-1p": "stand-in",
    "num-distributed-optimizer-instances": "rule: instances",
    "decoder-first-pipeline-num-layers": "rule: last-stage-alone",
    "decoder-last-pipeline-num-layers": "rule: last-stage-alone",
    "tokenizer-type": "rule: vocabulary-tokenizer",
}
"""Flag without a key of ours -> how it is followed."""

OPTIONS: Mapping[str, tuple[str, Any]] = {
    "no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    "no-rope-fusion": ("apply_rope_fusion", False),
    "moe-permute-fusion": ("moe_permute_fusion", True),
    "no-bias-gelu-fusion": ("bias_activation_fusion", False),
    "no-bias-swiglu-fusion": ("bias_activation_fusion", False),
    "no-bias-dropout-fusion": ("bias_dropout_fusion", False),
}
"""Flag -> option of core's configuration that it sets."""

IRRELEVANT = re.compile(
    "attention-softmax-in-fp32|apply-query-key-layer-scaling|use-mcore-models|no-mmap-bin-files|"
    "fim-.*|rampup-batch-size|train-samples|ddp-average-in-collective|disable-gloo-process-groups|use-tp-pp-dp-mapping|"
    "no-.*-fusion|no-persist-layer-norm|no-create-attention-mask-in-dataloader|te-rng-tracker|calculate-per-token-loss|rotary-interleaved|muon-.*|"
    "moe-router-dtype|moe-permute-fusion|moe-router-fusion|cuda-graph-.*|optimizer|group-query-attention|"
    "defer-embedding-wgrad-compute|wgrad-deferral-limit|overlap-moe-expert-parallel-comm|test-mode|tp-comm-overlap.*|"
    "apply-wd-to-qk-layernorm|microbatch-group-size-per-virtual-pipeline-stage|overlap-p2p-.*|offload-modules|"
    "enable-experimental|num-layers-per-virtual-pipeline-stage|num-virtual-stages-per-pipeline-rank"
)
"""Flags that change no static memory, or that are read below."""

READ_BELOW = frozenset(
    {"make-vocab-size-divisible-by", "moe-layer-freq", "recompute-modules", "rampup-batch-size", "num-query-groups"}
    | {"vocab-size", "fp16", "sequence-parallel", "position-embedding-type", "moe-router-load-balancing-type"}
    | {"moe-aux-loss-coeff", "cp-comm-type", "num-experts", "moe-token-dispatcher-type"}
    | {"distributed-backend", "expert-tensor-parallel-size"}
)
SECTIONS = ("model", "parallel", "precision")
TRAINING = (
    "micro_batch_size",
    "global_batch_size",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)


def golden_case(row: Row) -> Case | NotCovered:
    """One functional test."""
    flags = {name: value for name, value in row.flags.items() if value.lower() != "false"}
    if not flags:
        return NotCovered(row, "the row has no command line")
    if reason := _refused(row, flags):
        return NotCovered(row, reason)
    inferred = ["vocabulary-padded"]
    values = {**_defaults(flags), **_same(flags), **_experts(flags), **_layers(row, flags, inferred)}
    if "multi-latent-attention" in flags:  # core's MLATransformerConfig
        values |= {"model.rope_type": "yarn", "model.kv_channels": None}
    values |= _vocabulary(row, flags, inferred)
    case = Case(
        row=row,
        values={key: value for key, value in values.items() if value is not None},
        gpu=row.text("gpu_type"),
        stage=-1,
        target=target_of(flags),
        inferred=tuple(inferred),
        equal=_stand_ins(flags),
    )
    return _with_gpus(case, _whole(flags, "num-distributed-optimizer-instances", 1))


def _stand_ins(flags: Mapping[str, str]) -> tuple[str, ...]:
    found = {"fp16": "fp16", "squared-relu": "squared-relu", "apply-layernorm-1p": "layernorm-1p"}
    top_1 = ["top-1"] if flags.get("moe-router-topk") == "1" and "moe-router-pre-softmax" not in flags else []
    return (*(name for flag, name in found.items() if flag in flags), *top_1)


def target_of(flags: Mapping[str, str]) -> Target:
    """What the flags say of kernels and formats."""
    local = flags.get("transformer-impl") == "local"
    fused = "core-fused" if flags.get("cross-entropy-fusion-impl", "native") == "native" else "te"
    return Target(
        engine="core" if local else "te",
        attention="unfused" if local else flags.get("attention-backend", "auto"),
        loss=fused if "cross-entropy-loss-fusion" in flags else "core",
        options=tuple(option for flag, option in OPTIONS.items() if flag in flags),
        fp8=flags.get("fp8-recipe", "delayed") if "fp8-format" in flags else None,
        fp16="fp16" in flags,
        deterministic="deterministic-mode" in flags,
    )


def unknown_flags(row: Row) -> list[str]:
    """Flags of a row that nobody here has an opinion on."""
    known = {*NOT_OURS, *SUPPORTED, *READ_BELOW}
    return [
        flag
        for flag in row.flags
        if flag not in known and f"--{flag}" not in flag_table() and not IRRELEVANT.fullmatch(flag)
    ]


def _refused(row: Row, flags: Mapping[str, str]) -> str | None:
    """Why the row is not covered, None where it is."""
    for flag, reason in NOT_OURS.items():
        if flag in flags:
            return f"--{flag}: {reason}"
    if "offloading" in row.text("model"):  # the column leaves the flag out
        return "--fine-grained-activation-offloading, named by the test alone: offloading is not offered"
    if flags.get("optimizer", "adam") != "adam":
        return f"--optimizer {flags['optimizer']}: only Adam is offered"
    if unknown := unknown_flags(row):
        return f"--{unknown[0]} is not known"
    return None


def _same(flags: Mapping[str, str]) -> dict[str, Any]:
    """Flags that are keys of ours with the same meaning."""
    table, values = flag_table(), {}
    for name, value in flags.items():
        if name in READ_BELOW or f"--{name}" not in table:
            continue
        key, constant = table[f"--{name}"]
        if key.name.partition(".")[0] in SECTIONS or key.field in TRAINING:
            values[key.name] = value if constant is None else constant
    return values


def _defaults(flags: Mapping[str, str]) -> dict[str, Any]:
    """Megatron's defaults where ours differ, and what it derives."""
    heads, width = _whole(flags, "num-attention-heads"), _whole(flags, "hidden-size")
    gated, biases = "swiglu" in flags, "disable-bias-linear" not in flags
    tp = _whole(flags, "tensor-model-parallel-size", 1)
    positions = "rope" if "use-rotary-position-embeddings" in flags else "learned_absolute"
    return {
        "parallel.device": "cuda",
        "model.normalization": "LayerNorm",
        "model.swiglu": False,
        "model.ffn_hidden_size": 4 * width * 2 // 3 // 64 * 64 if gated else 4 * width,
        "model.add_bias_linear": biases,
        "model.add_qkv_bias": biases or "add-qkv-bias" in flags,
        "model.untie_embeddings_and_output_weights": False,
        "model.position_embedding_type": flags.get("position-embedding-type", positions),
        "model.num_query_groups": flags.get("num-query-groups", 1) if "group-query-attention" in flags else heads,
        "model.attention_dropout": 0.1,
        "model.hidden_dropout": 0.1,
        "parallel.sequence_parallel": "sequence-parallel" in flags and tp > 1,  # Megatron switches it off for tp 1
        "parallel.use_distributed_optimizer": False,
        "parallel.overlap_grad_reduce": False,
        "precision.bf16": "bf16" in flags or "fp16" in flags,
        "precision.accumulate_allreduce_grads_in_fp32": not {"fp16", "grad-reduce-in-bf16"} & set(flags),
    } | _recomputed(flags)


def _recomputed(flags: Mapping[str, str]) -> dict[str, Any]:
    modules = flags.get("recompute-modules", "").strip("[]").split()
    return {"train.recompute_modules": tuple(modules)} if modules else {}


def _layers(row: Row, flags: Mapping[str, str], inferred: list[str]) -> dict[str, Any]:
    """Layers and how they divide over the pipeline."""
    layers, pp = _whole(flags, "num-layers"), _whole(flags, "pipeline-model-parallel-size", 1)
    if last := _whole(flags, "decoder-last-pipeline-num-layers", 0):
        inferred.append("last-stage-alone")
        return {"model.num_layers": pp * last}
    each = _whole(flags, "num-layers-per-virtual-pipeline-stage", 0)
    stated = _whole(flags, "num-virtual-stages-per-pipeline-rank", row.whole("vpp", 1) or 1)
    chunks = layers // (pp * each) if each and layers % (pp * each) == 0 else stated
    values: dict[str, Any] = {"parallel.virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
    both = {f"account-for-{part}-in-pipeline-split" for part in ("embedding", "loss")}
    if layers % (pp * chunks) and (layers + 2) % (pp * chunks) == 0 and not both & set(flags):
        inferred.append("split-counts-both")
        values |= {f"parallel.{flag.replace('-', '_')}": True for flag in both}
    return values


def _vocabulary(row: Row, flags: Mapping[str, str], inferred: list[str]) -> dict[str, Any]:
    """Entries of the vocabulary and the multiple that it is padded to."""
    stated = _whole(flags, "vocab-size", 0) or row.whole("vocab")
    if stated is None:
        inferred.append("vocabulary-tokenizer")
        stated = TOKENIZERS.get(flags.get("tokenizer-type", ""), 50_257)
    multiple = _whole(flags, "make-vocab-size-divisible-by", 128)
    return {
        "model.vocab_size": stated,
        "model.make_vocab_size_divisible_by": multiple * _whole(flags, "tensor-model-parallel-size", 1),
    }


def _experts(flags: Mapping[str, str]) -> dict[str, Any]:
    """Which layers have experts, and how tokens reach them."""
    if "num-experts" not in flags:
        return {}
    values: dict[str, Any] = {
        "model.num_moe_experts": flags["num-experts"],
        "parallel.expert_tensor_parallel_size": flags.get("expert-tensor-parallel-size"),
        "parallel.moe_token_dispatcher_type": flags.get("moe-token-dispatcher-type", "allgather"),
        "model.moe_ffn_hidden_size": flags.get("moe-ffn-hidden-size", flags.get("ffn-hidden-size")),
    }
    values = {key: value for key, value in values.items() if value is not None}
    if flags.get("moe-router-topk") == "1":  # the only choice of one expert that we share with core
        values["model.moe_router_pre_softmax"] = True
    if groups := re.fullmatch(r"\(\[0\]\*(\d+)\+\[1\]\*\d+\)", flags.get("moe-layer-freq", "1")):
        values["model.moe_first_dense_layers"] = int(groups[1])
    elif flags.get("moe-layer-freq", "1").isdigit():
        values["model.moe_layer_freq"] = int(flags.get("moe-layer-freq", "1"))
    return values


def _whole(flags: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A flag as a whole number.

    Raises:
        ConfigError: it is none, or is not there and has no default.
    """
    text = flags.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ConfigError(f"--{name} = {text!r} is no whole number")
    return int(text)


def _with_gpus(case: Case, instances: int) -> Case | NotCovered:
    """The case on the GPUs that it ran on; every instance of the optimizer is a world of its own."""
    if instances > 1:
        case = dataclasses.replace(case, inferred=(*case.inferred, "instances"))
    gpus = case.row.whole("gpus")
    if gpus is None and "_release" in case.row.text("model"):
        target = dataclasses.replace(case.target, cached_gradients=False)
        inferred = (*case.inferred, "gpus-release", "release-before-te-2.3")
        return _nearest_world(dataclasses.replace(case, target=target, inferred=inferred))
    if gpus is None:
        case, gpus = dataclasses.replace(case, inferred=(*case.inferred, "gpus-ci")), CI_GPUS
    case = _in_world(case, gpus // instances)
    batch = case.config.train.global_batch_size // instances
    return dataclasses.replace(case, values={**case.values, "train.global_batch_size": batch})


def _in_world(case: Case, gpus: int) -> Case:
    return dataclasses.replace(case, values={**case.values, "parallel.world_size": gpus})


def _nearest_world(case: Case) -> Case | NotCovered:
    """Rule ``gpus-release``."""
    measured = case.measured("static_mem_gib")
    if measured is None:
        return NotCovered(case.row, "neither the GPUs nor the static memory are stated")
    parallel, train = case.config.parallel, case.config.train
    worlds = [parallel.smallest_world_size << power for power in range(10)]
    fitting = [
        world
        for world in worlds
        if train.global_batch_size % (world // parallel.model_parallel_size * train.micro_batch_size) == 0
    ]
    stage = parallel.pipeline_model_parallel_size - 1
    kept = sum(kept_bytes(case).values())
    error = {world: abs(state_of(case.config, stage, world).total + kept - measured * 2**30) for world in fitting}
    return _in_world(case, min(error, key=error.__getitem__)) if error else NotCovered(case.row, "no world fits")
