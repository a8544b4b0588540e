"""Rows of printed tables and data files: the columns of the CSV -> our configuration.

What a table has in common beyond its columns is its :class:`Table`: the models' style, what it leaves out, whose
memory it prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from megatron_slm.config.presets import PRESETS
from tests.bench.published import Case, NotCovered, Reader, Row, Target
from tests.bench.published_golden import golden_case

GPT: Mapping[str, Any] = MappingProxyType(
    {
        "model.normalization": "LayerNorm",
        "model.swiglu": False,
        "model.add_bias_linear": True,
        "model.add_qkv_bias": True,
        "model.position_embedding_type": "learned_absolute",
        "model.untie_embeddings_and_output_weights": False,
        "model.attention_dropout": 0.1,
        "model.hidden_dropout": 0.1,
    }
)
LLAMA: Mapping[str, Any] = MappingProxyType({"model.untie_embeddings_and_output_weights": True})
"""The defaults of our model section are those of Llama."""

FULL: Mapping[str, Any] = MappingProxyType(
    {
        "train.recompute_granularity": "full",
        "train.recompute_method": "uniform",
        "train.recompute_num_layers": 1,
    }
)
CORE_ATTENTION: Mapping[str, Any] = MappingProxyType({"train.recompute_granularity": "selective"})

SCHEDULES = ("", "none", "1F1B", "1F1B-interleaved", "1F1B-I")
PRECISIONS = ("", "bf16", "fp16")
DEFAULT_VOCABULARY = 51_200


@dataclass(frozen=True, kw_only=True)
class Table:
    """What all rows of a source have in common.

    Attributes:
        style: of its models; None where the model's name says it.
        vocabulary: where the row has none, and the rule that says so.
        wide_gradients: 16-bit weights accumulate their gradients in fp32.
        target: program.
        stage: whose memory is printed; None is the largest.
        ends_lighter: first and last stage hold one layer fewer.
    """

    style: Mapping[str, Any] | None = None
    vocabulary: tuple[int, str] = (DEFAULT_VOCABULARY, "vocabulary-gpt2")
    wide_gradients: bool = True
    target: Target = Target()
    stage: int | None = None
    ends_lighter: bool = False
    rules: tuple[str, ...] = ()


EARLY = Target(engine="core", attention="unfused", loss="core")
"""Megatron before Transformer Engine and flash attention."""

SIMUMAX = Target(options=(("cp_comm_type", "a2a"), ("moe_permute_fusion", True), ("bias_dropout_fusion", False)))
"""MooreThreads/SimuMax v1.2, simu_tools/megatron_scripts/scripts."""

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "SC21-T1": Table(style=GPT, wide_gradients=False, target=EARLY),
        "K22": Table(style=GPT, wide_gradients=False, target=EARLY),
        "MTNLG": Table(style=GPT, wide_gradients=False, target=EARLY),
        "vTrain": Table(style=GPT, wide_gradients=False, target=EARLY),
        "ZB-T4": Table(style=GPT, wide_gradients=False, target=EARLY, ends_lighter=True),
        "VocabPar": Table(style=GPT, wide_gradients=False, target=EARLY),
        "SimuMax": Table(target=SIMUMAX),
        "AlephLayouts": Table(
            style=LLAMA,
            vocabulary=(128_000, "vocabulary-128k"),
            wide_gradients=False,
            target=Target(engine="plain"),
            rules=("batch-from-mfu", "gradients-16"),
        ),
        "DGXC": Table(),
        "MBridge-2": Table(),
        "Nemotron4": Table(style=GPT),
    }
)
"""How a source's name begins -> what its rows have in common."""


def readers() -> dict[str, Reader]:
    """The reader of every source that there is one for."""
    return {
        "MCore-golden": golden_case,
        **{name: partial(table_case, table=table) for name, table in TABLES.items()},
    }


def table_case(row: Row, table: Table) -> Case | NotCovered:
    """One row of ``table``."""
    if reason := next((reason for check in _CHECKS if (reason := check(row))), None):
        return NotCovered(row, reason)
    inferred, equal = list(table.rules), []
    values = {"parallel.device": "cuda", **_style(row, table, inferred), **_shape(row, table, inferred)}
    values |= _division(row, table, inferred)
    values |= _training(row, table, inferred)
    if (row.whole("num_experts") or 0) and "deepseek" in row.text("model").lower():
        inferred.append("deepseek-shape")
        values |= _deepseek(row)
    if row.text("precision") == "fp16":
        equal.append("fp16")
    if row.text("dist_optimizer").startswith("ZeRO"):
        equal.append("zero-1")
    return Case(
        row=row,
        values={key: value for key, value in values.items() if value is not None},
        gpu=row.text("gpu_type"),
        stage=table.stage,
        target=_target(row, table.target),
        inferred=tuple(inferred),
        equal=tuple(equal),
    )


def kernel(row: Row) -> str:
    """AlephLayouts' attention kernel: "flash_attention2 + RMS kernel", "flash_attentionv1.0.8", "fused", "torch"."""
    return row.text("notes").partition("kernel ")[2].partition(";")[0]


def _target(row: Row, target: Target) -> Target:
    if target.engine != "plain":
        return target
    attention = "auto" if "flash" in kernel(row) else "unfused"
    return dataclasses.replace(target, attention=attention, fused_norm="RMS" in kernel(row))


def _schedule(row: Row) -> str | None:
    schedule = row.text("schedule")
    return None if schedule in SCHEDULES else f"schedule {schedule} is not offered"


def _complete(row: Row) -> str | None:
    needed = ("layers", "hidden", "heads", "seq_len", "gpus", "tp", "pp", "micro_batch", "global_batch")
    missing = [column for column in needed if not row.text(column)]
    return f"{', '.join(missing)} not stated" if missing else None


def _consistent(row: Row) -> str | None:
    return "the printed layout does not multiply out" if row.text("layout_ok") == "n" else None


def _format(row: Row) -> str | None:
    precision = row.text("precision").lower()
    return None if precision in PRECISIONS else f"precision {precision}: only 16-bit formats are timed"


def _sharding(row: Row) -> str | None:
    sharding = row.text("dist_optimizer")
    return None if sharding in ("", "y", "n", "ZeRO-1") else f"{sharding} is not offered"


def _ran(row: Row) -> str | None:
    status = row.text("status")
    return None if status in ("ok", "OOM") else f"status {status!r}"


_CHECKS: tuple[Callable[[Row], str | None], ...] = (_ran, _complete, _consistent, _schedule, _format, _sharding)


def _style(row: Row, table: Table, inferred: list[str]) -> dict[str, Any]:
    """The options that make a GPT or a Llama."""
    style = table.style
    if style is None:
        gpt = row.text("model").lower().startswith(("gpt", "nemotron"))
        style = GPT if gpt else LLAMA
    inferred.append("style-gpt" if style is GPT else "style-llama")
    return dict(style)


def _shape(row: Row, table: Table, inferred: list[str]) -> dict[str, Any]:
    """The numbers of the model."""
    hidden, heads, vocabulary = row.whole("hidden"), row.whole("heads"), row.whole("vocab")
    if vocabulary is None:
        vocabulary, rule = table.vocabulary
        inferred.append(rule)
    if row.whole("kv_heads") is None:
        inferred.append("heads-equal")
    if row.whole("ffn_hidden") is None:
        inferred.append("width-4h")
    layers, places = row.whole("layers") or 0, (row.whole("pp", 1) or 1) * (row.whole("vpp", 1) or 1)
    if layers % places and not table.ends_lighter:
        inferred.append("fullest-stage")
        layers = -(-layers // places) * places
    return {
        "model.num_layers": layers,
        "model.hidden_size": hidden,
        "model.ffn_hidden_size": row.whole("ffn_hidden", 4 * (hidden or 0)),
        "model.num_attention_heads": heads,
        "model.num_query_groups": row.whole("kv_heads", heads),
        "model.vocab_size": vocabulary,
        "model.seq_length": row.whole("seq_len"),
        "model.num_moe_experts": row.whole("num_experts"),
        "model.moe_router_topk": row.whole("moe_topk"),
        "model.moe_ffn_hidden_size": row.whole("moe_ffn_hidden"),
    }


def _division(row: Row, table: Table, inferred: list[str]) -> dict[str, Any]:
    """How the job is divided over its GPUs."""
    tp, chunks = row.whole("tp", 1) or 1, row.whole("vpp", 1) or 1
    values: dict[str, Any] = {
        "parallel.world_size": row.whole("gpus"),
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": row.whole("pp"),
        "parallel.virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "parallel.context_parallel_size": row.whole("cp", 1),
        "parallel.expert_model_parallel_size": row.whole("ep", 1),
        "parallel.expert_tensor_parallel_size": row.whole("etp"),
        "parallel.sequence_parallel": tp > 1 and row.text("sequence_parallel") == "y",
        "parallel.use_distributed_optimizer": row.text("dist_optimizer") in ("y", "ZeRO-1"),
        "parallel.overlap_grad_reduce": False,
        "model.make_vocab_size_divisible_by": 128 * tp,
    }
    if table.ends_lighter:
        inferred.append("ends-lighter")
        values |= {f"parallel.account_for_{part}_in_pipeline_split": True for part in ("embedding", "loss")}
    return values


def _training(row: Row, table: Table, inferred: list[str]) -> dict[str, Any]:
    """Batch, format and what is recomputed."""
    recompute = row.text("recompute")
    for column, rule in (("precision", "precision-16"), ("recompute", "recompute-none")):
        if not row.text(column):
            inferred.append(rule)
    values: dict[str, Any] = {
        "train.micro_batch_size": row.whole("micro_batch"),
        "train.global_batch_size": row.whole("global_batch"),
        "precision.bf16": True,
        "precision.accumulate_allreduce_grads_in_fp32": table.wide_gradients,
    }
    if recompute.startswith("full"):
        return {**values, **FULL}
    return {**values, **CORE_ATTENTION} if recompute.startswith("selective") else values


def _deepseek(row: Row) -> dict[str, Any]:
    """What the columns do not say of DeepSeek-V2 and V3, in SimuMax's runs."""
    latent = ["multi_latent_attention", "qk_layernorm", "q_lora_rank", "kv_lora_rank", "qk_head_dim"]
    latent += ["qk_pos_emb_head_dim", "v_head_dim"]
    preset = PRESETS["deepseek-v3"].values
    shared = 2 if "v2" in row.text("model").lower() else 1
    return {
        **{f"model.{name}": preset[f"model.{name}"] for name in latent},
        "model.moe_first_dense_layers": 1,
        "model.moe_shared_expert_intermediate_size": shared * (row.whole("moe_ffn_hidden") or 0),
        "model.moe_router_pre_softmax": True,
        "model.moe_expert_capacity_factor": 1.0,
        "model.moe_router_load_balancing_type": "seq_aux_loss",
        "model.moe_aux_loss_coeff": 3e-3,
        "parallel.moe_grouped_gemm": True,
    }
