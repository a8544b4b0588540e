"""Published runs as configurations, the closed form of their static memory, and the report's arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.errors import DataError
from megatron_slm.parallel import device
from tests.bench.planner_metrics import Pair, errors, leave_one_out, regret, verdicts, within
from tests.bench.published import POINTS, Case, NotCovered, Row, Target, case_of, cases_of, read_rows
from tests.bench.published_static import MIB, chunk_tensors, kept_bytes, padded, state_of, torch_workspace
from tests.bench.published_tables import readers

SMALL = (
    "num-layers=12; hidden-size=512; num-attention-heads=8; micro-batch-size=4; global-batch-size=32; seq-length=1024; "
    "max-position-embeddings=1024; transformer-impl=transformer_engine; deterministic-mode=true; bf16=true; "
    "attention-backend=unfused; no-gradient-accumulation-fusion=true"
)
"""What Megatron's functional tests have in common."""


def golden(flags: str = "", **cells: str) -> Case:
    """The case of a functional test with ``flags`` beside :data:`SMALL`."""
    found = golden_or_not(flags, **cells)
    assert isinstance(found, Case), found
    return found


def golden_or_not(flags: str = "", **cells: str) -> Case | NotCovered:
    stated = {"row": "1", "source_id": "MCore-golden", "model": "gpt", "gpus": "8", "vocab": "50257"}
    row = Row({**stated, "gpu_type": "H100-80GB-SXM", **cells, "flags": f"{SMALL}; {flags}".rstrip("; ")})
    return case_of(row, readers())


def test_defaults_of_megatron_are_made_explicit() -> None:
    config = golden("tensor-model-parallel-size=2; pipeline-model-parallel-size=2").config
    model, parallel = config.model, config.parallel
    assert (model.normalization, model.swiglu, model.add_bias_linear) == ("LayerNorm", False, True)
    assert (model.position_embedding_type, model.untie_embeddings_and_output_weights) == ("learned_absolute", False)
    assert (model.hidden_dropout, model.ffn_size, model.query_groups) == (0.1, 2048, 8)
    assert model.padded_vocab_size(50257) == 50432, "a multiple of 128 x tp"
    assert (parallel.world_size, parallel.use_distributed_optimizer, parallel.overlap_grad_reduce) == (8, False, False)


def test_swiglu_rounds_its_width_down_as_megatron_does() -> None:
    assert golden("swiglu=true").config.model.ffn_size == 1344


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("num-query-groups=2", {"num_query_groups": 8}),
        ("num-query-groups=2; group-query-attention=true", {"num_query_groups": 2}),
        ("num-experts=8; moe-layer-freq=([0]*3+[1]*9)", {"num_moe_experts": 8, "moe_first_dense_layers": 3}),
        ("position-embedding-type=rope", {"position_embedding_type": "rope"}),
        ("disable-bias-linear=true", {"add_bias_linear": False, "add_qkv_bias": False}),
    ],
)
def test_flags_of_the_model(flags: str, expected: Mapping[str, Any]) -> None:
    model = golden(flags).config.model
    assert {name: getattr(model, name) for name in expected} == expected


def test_the_program_behind_the_flags() -> None:
    local = golden("transformer-impl=local; cross-entropy-loss-fusion=true; fp8-format=hybrid; fp8-recipe=tensorwise")
    assert local.target.engine == "core" and local.target.attention == "unfused"
    assert (local.target.loss, local.target.fp8, local.target.deterministic) == ("core-fused", "tensorwise", True)
    assert ("gradient_accumulation_fusion", False) in local.target.options


@pytest.mark.parametrize(
    ("flags", "cells", "reason"),
    [
        ("optimizer=muon", {}, "only Adam"),
        ("use-megatron-fsdp=true", {}, "FSDP"),
        ("pipeline-model-parallel-layout=Et|tL", {}, "uneven layout"),
        ("no-such-flag=1", {}, "--no-such-flag is not known"),
        ("", {"model": "moe_fine_grained_offloading"}, "offloading"),
        ("hidden-size=none", {}, "--hidden-size = 'none' is no whole number"),
        ("seq-length=none", {}, "model.seq_length"),
    ],
)
def test_what_is_not_covered_says_why(flags: str, cells: dict[str, str], reason: str) -> None:
    found = golden_or_not(flags, **cells)
    assert isinstance(found, NotCovered) and reason in found.reason


def test_what_is_not_stated_is_inferred_by_a_named_rule() -> None:
    assert "gpus-ci" in golden("", gpus="").inferred
    lighter = golden("num-layers=6; pipeline-model-parallel-size=4", vpp="2")
    assert "split-counts-both" in lighter.inferred
    assert lighter.config.parallel.account_for_loss_in_pipeline_split
    uneven = golden("pipeline-model-parallel-size=4; decoder-last-pipeline-num-layers=2")
    assert "last-stage-alone" in uneven.inferred and uneven.config.model.num_layers == 8
    shared = golden("use-distributed-optimizer=true; num-distributed-optimizer-instances=2")
    assert "instances" in shared.inferred and shared.world_size == 4
    assert shared.config.train.global_batch_size == 16, "as many micro-batches as before"


def test_the_world_of_a_release_run_is_that_of_its_static_memory() -> None:
    flags = "use-distributed-optimizer=true; tensor-model-parallel-size=2"
    stated = golden(flags, gpus="16")
    size = state_of(stated.config, 0, 16).total + sum(kept_bytes(stated).values())
    found = golden(flags, model="gpt_release", gpus="", static_mem_gib=str(size / 2**30))
    assert found.world_size == 16 and "gpus-release" in found.inferred
    assert not found.target.cached_gradients


@pytest.mark.parametrize(
    ("flags", "gpu", "measured"),
    [
        # golden_values_dev_dgx_{h100,a100}.json of gpt3_mcore_te_tp1_pp1_dist_optimizer_no_mmap_bin_files
        ("use-distributed-optimizer=true", "H100-80GB-SXM", 0.54155),
        ("use-distributed-optimizer=true", "A100-80GB-SXM", 0.51421),
        # gpt3_mcore_tp1_pp1_dist_optimizer_overlap_grad_reduce_param_gather, dgx_a100
        ("use-distributed-optimizer=true; transformer-impl=local", "A100-80GB-SXM", 0.5728),
        # gpt3_mcore_te_tp4_pp1_qk_layernorm_test_mode, dgx_a100
        ("tensor-model-parallel-size=4; qk-layernorm=true", "A100-80GB-SXM", 0.34309),
    ],
)
def test_the_closed_form_is_what_megatron_measures(flags: str, gpu: str, measured: float) -> None:
    case = golden(flags, gpu_type=gpu)
    static = state_of(case.config, 0, case.world_size).total + sum(kept_bytes(case).values())
    assert static / 2**30 == pytest.approx(measured, abs=2e-4), "a fifth of a MiB"


def test_buffers_are_padded_as_cores() -> None:
    assert padded([1, 64, 65], 1) == 256, "starts at 0, 64, 128; ends at a multiple of 128"
    assert padded([100], 3) == 384, "lcm(3, 128)"


def test_workspaces() -> None:
    assert torch_workspace("H100-80GB-SXM", deterministic=False) == 32 * MIB
    assert torch_workspace("A100-80GB-SXM", deterministic=True) == 32 * MIB
    assert torch_workspace("GB200", deterministic=False) == 8320 * 1024
    grouped = "num-experts=8; moe-grouped-gemm=true; disable-bias-linear=true"
    assert kept_bytes(golden(grouped))["cuBLAS workspaces of TE"] == 5 * 32 * MIB


DENSE = "swiglu=true; disable-bias-linear=true; position-embedding-type=rope; normalization=RMSNorm"
LATENT = (
    "multi-latent-attention=true; q-lora-rank=256; kv-lora-rank=128; qk-head-dim=64; qk-pos-emb-head-dim=32; "
    "v-head-dim=64; qk-layernorm=true"
)
EXPERTS = (
    "num-experts=8; expert-model-parallel-size=2; moe-ffn-hidden-size=256; moe-shared-expert-intermediate-size=256"
)


@pytest.mark.parametrize(
    "flags",
    [
        "tensor-model-parallel-size=2; pipeline-model-parallel-size=2; use-distributed-optimizer=true",
        f"{DENSE}; {LATENT}; {EXPERTS}; untie-embeddings-and-output-weights=true; use-distributed-optimizer=true; "
        "mtp-num-layers=1",
        f"{DENSE}; tensor-model-parallel-size=2; pipeline-model-parallel-size=2",
    ],
    ids=["dense, sharded", "latent, experts, prediction", "dense, whole"],
)
def test_the_closed_form_is_what_the_modules_hold(flags: str) -> None:
    device.preload("cpu")
    from tests.bench.published_dry import trace_stage

    case = golden(f"{flags}; num-layers=2; seq-length=64; no-rope-fusion=true")
    stage = case.config.parallel.pipeline_model_parallel_size - 1
    trace = trace_stage(case, stage, {})
    state = state_of(case.config, stage, case.world_size)
    held = {kind: sum(part.size for part in trace.static if part.kind == kind) for kind in ("parameters", "gradients")}
    optimizer = sum(part.size for part in trace.static if part.kind in ("master weights", "moments"))
    assert held == {"parameters": state.parameters, "gradients": state.gradients}
    assert optimizer == pytest.approx(state.optimizer, rel=1e-4), "a shard's padding has no master weight"


def test_every_printed_figure_is_covered() -> None:
    cases = cases_of(read_rows(POINTS), readers())
    assert len(cases) == 40
    assert [case for case in cases if isinstance(case, NotCovered)] == []


def test_a_measured_peak_is_predicted() -> None:
    device.preload("cpu")
    from tests.bench.published_dry import predict_memory

    rows = [row for row in read_rows(POINTS) if row.text("row") == "550"]
    (case,) = cases_of(rows, readers())
    assert isinstance(case, Case)
    assert predict_memory(case).peak / 2**30 == pytest.approx(52.889, rel=0.005), "Llama-3 405B, 4 layers, tp4, B200"


def plain(kernel: str, **cells: str) -> Case:
    """A case of AlephLayouts with four small layers."""
    shape = {"layers": "4", "hidden": "256", "ffn_hidden": "512", "heads": "8", "kv_heads": "8", "seq_len": "128"}
    layout = {"gpus": "4", "gpu_type": "A100", "tp": "1", "pp": "1", "micro_batch": "2", "global_batch": "32"}
    stated = {"row": "1", "source_id": "AlephLayouts", "model": "LLAMA", "status": "ok", "recompute": "none"}
    case = case_of(Row({**stated, **shape, **layout, "notes": f"kernel {kernel}; x", **cells}), readers())
    assert isinstance(case, Case), case
    return case


@pytest.mark.parametrize(
    ("kernel", "cells", "kept"),
    [
        ("flash_attention2", {}, 4 + 2 + 2),
        ("flash_attention2 + RMS kernel", {}, 2),
        ("flash_attention2 + RMS kernel", {"tp": "2", "sequence_parallel": "y"}, 2),
    ],
    ids=["in fp32, op by op", "a kernel", "gathered"],
)
def test_norms_of_the_plain_program_keep(kernel: str, cells: dict[str, str], kept: int) -> None:
    device.preload("cpu")
    from megatron_slm.memory.replay import saved_blocks
    from tests.bench.published_dry import trace_stage

    case = plain(kernel, **cells)
    trace = trace_stage(case, 0, {})
    norm = "decoder.layers.1.pre_mlp_layernorm"
    found = [trace.blocks[number].size for number in saved_blocks(trace) if trace.blocks[number].module == norm]
    channels = 128 * 2 * 256
    assert sum(size for size in found if size >= channels) == kept * channels


def test_the_plain_program_keeps_the_logits_of_the_micro_batch_before() -> None:
    device.preload("cpu")
    from tests.bench.published_dry import trace_stage

    case = plain("flash_attention2")
    trace = trace_stage(case, 0, {})
    logits = 128 * 2 * (case.config.model.vocab_size or 0) * 2
    assert [trace.blocks[number].size for number in trace.persistent].count(logits) == 1


def test_core_s_fused_loss_has_two_buffers_of_logits() -> None:
    device.preload("cpu")
    from tests.bench.published_dry import predict_memory

    flags = "num-layers=1; hidden-size=64; vocab-size=50000; seq-length=64; "
    fused, unfused = (
        predict_memory(golden(flags + more, peak_mem_gib="1")).peak for more in ("cross-entropy-loss-fusion=true", "")
    )
    assert fused > unfused


def test_experts_of_several_ranks_are_never_even() -> None:
    device.preload("cpu")
    from megatron_slm.memory.ledger import Row as Part
    from tests.bench.published_dry import FULLEST, uneven

    flags = f"{DENSE}; {EXPERTS}; moe-token-dispatcher-type=alltoall"
    parts = [
        Part(0, 0, 0, "layer_0", f"decoder.layers.0.{module}", "activations", 1000, 1000, 1000, 0, 1)
        for module in ("mlp.experts.linear_fc1", "mlp.router", "self_attention.linear_qkv")
    ]
    assert uneven(parts, golden(flags).config) == round(1000 * (FULLEST - 1))


def test_flops_of_the_tables_own_count() -> None:
    from tests.bench.published_time import measured_seconds

    (case,) = cases_of([row for row in read_rows(POINTS) if row.text("row") == "1"], readers())
    assert isinstance(case, Case)
    # 96 B s L h^2 (1 + s / 6h + V / 16 L h) of GPT-1.7B, by hand, over 32 GPUs at 137 TFLOP/s
    assert measured_seconds(case) == pytest.approx(1.5467e16 / (32 * 137e12), rel=1e-3)


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "short.csv").write_text("row,model\n1,a\n")
    with pytest.raises(DataError, match="no column source_id"):
        read_rows(tmp_path / "short.csv")
    with pytest.raises(DataError, match="layers = 'many' is no number"):
        Row({"layers": "many"}).whole("layers")


def test_shares_and_errors_by_hand() -> None:
    pairs = [Pair(1.0, 1.05), Pair(100.0, 100.9), Pair(100.0, 102.0)]
    assert within(pairs, absolute=0.1, relative=0.01) == pytest.approx(2 / 3)
    found = errors([Pair(110, 100), Pair(80, 100)])
    assert found is not None and (round(found.mean, 9), round(found.worst, 9), round(found.bias, 9)) == (15, 20, -5)
    assert errors([]) is None and within([], absolute=1, relative=1) is None


def test_verdicts_by_hand() -> None:
    runs = [("fits", False), ("fits", True), ("tight", False), ("does not fit", True), ("tight", True)]
    found = verdicts(runs)
    assert found is not None and (found.false_fit, found.false_oom, found.ok, found.oom) == (50, 50, 2, 3)


def test_regret_is_that_of_the_shortest_prediction_of_each_group() -> None:
    items = [("a", Pair(1, 12)), ("a", Pair(2, 10)), ("b", Pair(3, 5)), ("b", Pair(4, 6)), ("alone", Pair(1, 1))]
    found = regret(items, lambda item: item[0], lambda item: item[1])
    assert found is not None and (found.mean, found.worst, found.groups) == (pytest.approx(10), pytest.approx(20), 2)


def test_leaving_one_out_leaves_out_that_one() -> None:
    seen = leave_one_out([1, 2, 3], lambda others, item: Pair(sum(others), item))
    assert seen == [Pair(5, 1), Pair(4, 2), Pair(3, 3)]


def test_the_record_has_every_key_of_an_empty_table() -> None:
    device.preload("cpu")
    from tests.bench.planner_findings import Findings, MemoryFindings, SpeedFindings, TimeFindings
    from tests.bench.planner_page import BARS, page

    findings = Findings([], MemoryFindings(), TimeFindings(), SpeedFindings(10.0, {}), {"cpu_peak_worst_pct": 1.5})
    record = findings.record()
    assert {key for key, _, _ in BARS} == set(record)
    assert json.loads(json.dumps(record))["golden_static_within_share"] is None
    assert "| gloo ranks: peak, worst error, % | 1.5 | <= 2 |" in page(findings)


def test_rows_of_one_prediction_share_a_key() -> None:
    one, other = golden("", row="1"), golden("", row="2")
    assert one.key == other.key
    assert one.key != golden("", gpu_type="A100-80GB-SXM").key
    assert one.key != dataclasses.replace(one, target=Target(deterministic=True, loss="te")).key


def test_chunks_of_the_last_stage_end_with_the_output_matrix() -> None:
    config = golden("pipeline-model-parallel-size=2; num-layers-per-virtual-pipeline-stage=3").config
    assert len(chunk_tensors(config, 1, 1).dense) - len(chunk_tensors(config, 1, 0).dense) == 3, "norm and table"
