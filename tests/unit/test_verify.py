"""The parts of ``mslm verify`` that need no ranks: slices, differences, tolerances, batches, variants, the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm.config.run_config import RunConfig  # noqa: E402
from megatron_slm.data.config import DataConfig  # noqa: E402
from megatron_slm.model.config import ModelConfig  # noqa: E402
from megatron_slm.parallel import context  # noqa: E402
from megatron_slm.parallel.config import ParallelConfig  # noqa: E402
from megatron_slm.replay.shards import Shard, _name  # noqa: E402
from megatron_slm.replay.watch import Place, is_named  # noqa: E402
from megatron_slm.train.config import TrainConfig  # noqa: E402
from megatron_slm.verify import axes, setting  # noqa: E402
from megatron_slm.verify.batches import micro_batches  # noqa: E402
from megatron_slm.verify.compare import differences, judged  # noqa: E402
from megatron_slm.verify.report import Claim, Report, RunReport  # noqa: E402
from megatron_slm.verify.slices import held  # noqa: E402
from megatron_slm.verify.tolerance import FLOOR, Unit  # noqa: E402

CONFIG = RunConfig(
    name="small",
    model=ModelConfig(num_layers=4, hidden_size=32, seq_length=64, vocab_size=300, hidden_dropout=0.1),
    parallel=ParallelConfig(
        device="cpu",
        world_size=4,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        overlap_grad_reduce=False,
    ),
    train=TrainConfig(global_batch_size=8, recompute_granularity="selective"),
)


def place(tp: int = 0, cp: int = 0, tp_size: int = 2, cp_size: int = 2) -> Place:
    return Place(tp=tp, tp_size=tp_size, cp=cp, cp_size=cp_size, dp=0, dp_size=1, pp=0, pp_size=1)


def test_slices_of_all_ranks_are_the_whole() -> None:
    whole = torch.randn(16, 3, 8)
    parts = []
    for cp in range(2):
        sequence = [held(whole, torch.Size((4, 3, 8)), place(tp, cp), gated=False) for tp in range(2)]
        channels = [held(whole, torch.Size((8, 3, 4)), place(tp, cp), gated=False) for tp in range(2)]
        mine = torch.cat([part for part in sequence if part is not None], 0)
        assert mine.equal(torch.cat([part for part in channels if part is not None], 2))
        parts.append(mine)
    assert context.join(parts, 0).equal(whole)


def test_a_gated_matrix_is_cut_in_each_half() -> None:
    gate, up = torch.zeros(4, 1, 6), torch.ones(4, 1, 6)
    part = held(torch.cat([gate, up], 2), torch.Size((4, 1, 6)), place(tp=1, cp_size=1), gated=True)
    assert part is not None and part.flatten().tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0] * 4


def test_shapes_that_fit_no_cut_are_not_compared() -> None:
    assert held(torch.zeros(16, 3, 8), torch.Size((5, 3, 8)), place(), gated=False) is None
    assert held(torch.zeros(16, 3, 8), torch.Size((8, 8)), place(), gated=False) is None


def shard(start: int, values: list[float]) -> Shard:
    return Shard("weight", (4,), (slice(start, start + len(values)),), torch.tensor(values))


EXPECTED = {"weight": torch.tensor([3.0, 0.0, 0.0, 4.0])}


def test_differences_are_relative_and_of_the_worst_copy() -> None:
    whole, nan = [3.0, 0.0, 0.0, 4.0], math.nan
    assert differences([[shard(0, whole)]], EXPECTED) == {"weight": 0.0}
    assert differences([[shard(0, [3.0, 0.0])], [shard(2, [0.0, 5.0])]], EXPECTED) == {"weight": 0.2}
    assert differences([[shard(0, [3.0, 0.5, 0.0, 4.0])], [shard(0, whole)]], EXPECTED) == {"weight": 0.1}
    assert differences([[shard(0, [3.0, 0.0, nan, nan])], [shard(0, [nan, nan, 0.0, 4.0])]], EXPECTED)["weight"] == 0.0


@pytest.mark.parametrize(
    "found",
    [[], [[shard(0, [3.0, 0.0])]], [[shard(0, [3.0, 0.0, math.nan, 4.0])]], [[shard(0, [3.0, 0.0, math.inf, 4.0])]]],
)
def test_what_nobody_owns_and_what_is_not_finite_is_infinitely_wrong(found: list[list[Shard]]) -> None:
    assert differences(found, EXPECTED)["weight"] == math.inf


def test_the_worst_tensor_is_judged_by_the_noise_of_its_kind() -> None:
    noise = [{"layers.0.a": 1e-15, "layers.1.a": 3e-15, "b": 0.0}]
    errors = {"layers.0.a": 4.0e-14, "layers.1.a": 1e-15, "b": 1e-14}
    row = judged("gradients", Unit("fp64"), errors, noise, after_norm=False)
    assert row.equal and row.detail == "layers.0.a" and row.tolerance == pytest.approx(4.8e-14)
    row = judged("gradients", Unit("fp64"), errors | {"b": 2e-14}, noise, after_norm=False)
    assert row.failing == ("b",) and not row.all_fail and row.tolerance == FLOOR * 2.0**-52
    assert "1 of 3 tensors differ" in row.detail


def test_what_the_gradient_norm_has_touched_is_judged_in_single_precision() -> None:
    assert Unit("fp64").tolerance(0.0) == FLOOR * 2.0**-52
    assert Unit("fp64").tolerance(0.0, after_norm=True) == FLOOR * 2.0**-23
    assert Unit("bf16").tolerance(0.01) == pytest.approx(0.04)


def test_batches_do_not_depend_on_the_layout_and_are_uneven() -> None:
    config = replace(CONFIG, data=DataConfig(reset_attention_mask=True))
    whole = micro_batches(config, 3, dp_rank=0, dp_size=1)
    halves = [micro_batches(config, 3, dp_rank=rank, dp_size=2) for rank in range(2)]
    for number, batch in enumerate(whole):
        other = halves[number % 2][number // 2]
        assert all(batch[name].equal(other[name]) for name in batch)
    tokens = [int(batch["loss_mask"].sum()) for batch in whole]
    assert tokens[1] == 0 and 0 < tokens[0] < 16 and len(set(tokens)) > 4
    assert len({int(batch["document_ids"].max()) for batch in whole}) > 1
    assert not whole[0]["tokens"].equal(micro_batches(config, 4, dp_rank=0, dp_size=1)[0]["tokens"])


def test_one_rank_is_the_plainest_job_with_the_same_model_and_batch() -> None:
    compared = setting.compared(CONFIG, exact=True)
    assert compared.model.hidden_dropout == 0.0 and compared.precision.fp64
    changed = setting.differing(setting.one_rank(compared), compared)
    assert {key for key in changed if not key.startswith("parallel.")} == {"name", "train.recompute_granularity"}
    assert setting.one_rank(compared) == setting.one_rank(replace(compared, parallel=ParallelConfig(world_size=2)))


def test_axes_are_tried_alone_before_together() -> None:
    tried = list(axes.candidates(CONFIG))
    assert tried[0] == frozenset()
    assert tried.index(frozenset({"tp"})) < tried.index(frozenset({"tp", "pp"}))
    assert frozenset({"tp", "sp"}) in tried and frozenset({"sp"}) not in tried
    assert len(tried) == len(set(tried))


def test_the_smallest_failing_set_is_named() -> None:
    def fails(variant: RunConfig) -> bool:
        parallel = variant.parallel
        return parallel.sequence_parallel and parallel.pipeline_model_parallel_size > 1

    assert axes.smallest_failing(CONFIG, fails) == "tp+pp+sp"
    assert axes.smallest_failing(CONFIG, lambda variant: variant.train.recompute_granularity is not None) == "recompute"
    assert axes.smallest_failing(CONFIG, lambda variant: True) == "none: one rank alone differs too"
    assert axes.smallest_failing(CONFIG, lambda variant: False) is None


def test_names_of_stacked_layers_and_experts() -> None:
    assert _name("decoder.layers.mlp.linear_fc2.weight", (3,)) == "decoder.layers.3.mlp.linear_fc2.weight"
    assert _name("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (0,)) == (
        "decoder.layers.0.input_layernorm.weight"
    )
    assert _name("output_layer.weight", ()) == "output_layer.weight"


def test_experts_are_watched_where_their_tokens_are_in_order() -> None:
    assert is_named("decoder.layers.1") and is_named("decoder.layers.1.mlp.router")
    assert is_named("decoder.layers.1.mlp.shared_experts.linear_fc1")
    assert not is_named("decoder.layers.1.mlp.experts.local_experts.0.linear_fc1")
    assert not is_named("decoder")


def test_the_report_reads_the_same_on_paper_and_for_programs() -> None:
    right = Claim("gradients of step 1", "fp64", True, 1e-15, 1e-14, "embedding.weight")
    wrong = Claim("step 2 again from the checkpoint", "bf16", False, math.inf, 0.0, "b.weight (exp_avg)", ("b",))
    runs = [
        RunReport("2 ranks = tp 2", "a", [right]),
        RunReport("2 ranks = pp 2", "b", [right, wrong], "checkpoint", "resume", "pp"),
    ]
    report = Report("two runs", runs, [{"key": "model.num_layers", "before": "126", "after": "4", "reason": "small"}])
    text = report.render()
    assert "1 of 2 runs DIFFER" in text and "same bits" in text and "axis: pp" in text
    assert "b.weight (exp_avg)" in text and "embedding.weight" not in text and "126 -> 4" not in text
    assert "embedding.weight" in report.render(verbose=True) and "126 -> 4" in report.render(verbose=True)
    fields = json.loads(report.to_json())
    assert fields["equal"] is False and [run["equal"] for run in fields["runs"]] == [True, False]
    assert fields["runs"][1]["rows"][1]["error"] is None
    assert "all 1 claims hold" in Report("one run", runs[:1]).render()
