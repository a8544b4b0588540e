"""The ledger of a job: rows that add up, stages that share a trace, changes that would fit, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load, value_of
from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm.memory import fit, report  # noqa: E402
from megatron_slm.memory.capacity import GIB, Surroundings  # noqa: E402
from megatron_slm.memory.ledger import Ledger  # noqa: E402
from megatron_slm.memory.roles import communicators, held_layers, roles  # noqa: E402
from megatron_slm.run_dry import deep_check, job_ledgers  # noqa: E402

SMALL = (
    "model.hidden_size=64", "model.num_attention_heads=4", "model.seq_length=64", "model.vocab_size=500",
)  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return load(None, (*SMALL, *overrides)).config


PIPELINE = (
    "model.num_layers=8", "parallel.pipeline_model_parallel_size=4", "parallel.world_size=8",
    "train.global_batch_size=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> list[Ledger]:
    return job_ledgers(config(*PIPELINE), for_gpu=False)


def test_rows_add_up_to_the_worst_moment(pipeline: list[Ledger]) -> None:
    for one in pipeline:
        assert one.size == one.timeline.peak_bytes == sum(row.size for row in one.rows)
        assert all(0 <= row.begins <= row.ends < len(one.timeline.moments) for row in one.rows)
        assert all(row.low == row.size == row.high for row in one.rows), "a CPU has nothing that is uncertain"


def test_earlier_stages_hold_more_micro_batches(pipeline: list[Ledger]) -> None:
    held = [one.by_kind()["activations"] for one in pipeline]
    assert held[0] > held[1] > held[2] > held[3]
    per_micro_batch = held[1] - held[2]
    assert held[2] == pytest.approx(per_micro_batch * 2, rel=0.1)


def test_alike_stages_share_a_trace_and_keep_their_own_layers(pipeline: list[Ledger]) -> None:
    found = roles(config(*PIPELINE), 8)
    assert [(role.rank, role.like, role.shift) for role in found] == [(0, 0, 0), (2, 1, 0), (4, 1, 2), (6, 3, 0)]
    for stage, one in enumerate(pipeline):
        layers = {row.layer for row in one.rows if row.layer.startswith("layer_")}
        assert layers == {f"layer_{2 * stage}", f"layer_{2 * stage + 1}"}
        assert {row.rank for row in one.rows} == {2 * stage}
    own = job_ledgers(config(*PIPELINE), for_gpu=False, stage=2)
    assert [one.pipeline_rank for one in own] == [2]
    assert own[0].by_kind() == pipeline[2].by_kind()


def test_interleaved_chunks_hold_the_layers_core_gives_them() -> None:
    found = held_layers(config(*PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"))
    assert found == [[range(stage, stage + 1), range(4 + stage, 5 + stage)] for stage in range(4)]


def test_each_kind_is_what_arithmetic_says() -> None:
    """One rank, bf16, no distributed optimizer: 2 bytes a weight, 4 its gradient, 4 its master, 8 its moments."""
    one = job_ledgers(
        config("model.num_layers=2", "precision.bf16=true", "parallel.use_distributed_optimizer=false",
               "parallel.world_size=1", "train.global_batch_size=2"),
        for_gpu=False,
    )[0]  # fmt: skip
    kinds = {row.kind: 0 for row in one.rows}
    for row in one.rows:
        kinds[row.kind] += row.size if row.module != "padding" else 0
    count = kinds["parameters"] // 2
    assert count == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
    assert (kinds["gradients"], kinds["master weights"], kinds["moments"]) == (4 * count, 4 * count, 8 * count)


@pytest.mark.parametrize(
    ("capacity", "verdict"), [(1.0, "fits"), (0.0, "does not fit"), (0.5, "tight")], ids=["fits", "not", "tight"]
)
def test_the_verdict_is_by_the_band(capacity: float, verdict: str) -> None:
    layout = config("model.num_layers=2", "parallel.world_size=1", "train.global_batch_size=2")
    roomy = job_ledgers(layout, gpu="h100-80gb")[0]
    within = Surroundings(round(roomy.low + (roomy.high - roomy.low) * capacity), 0)
    judged = Ledger(0, 0, roomy.rows, roomy.timeline, within)
    assert roomy.low < roomy.size < roomy.high
    assert judged.verdict == verdict or (capacity == 0.0 and judged.low == within.capacity_bytes)
    assert Ledger(0, 0, roomy.rows, roomy.timeline, Surroundings(roomy.low - 1, 0)).verdict == "does not fit"


def test_communicators_are_groups_of_several_ranks() -> None:
    assert communicators(config().parallel, 1) == 0
    assert communicators(config("parallel.tensor_model_parallel_size=2").parallel, 2) == 2  # tp and the world
    assert communicators(config(*PIPELINE).parallel, 8) == 3  # pp, dp, world


def test_changes_that_save_are_ranked() -> None:
    large = config(
        "model.num_layers=4", "parallel.world_size=4", "train.global_batch_size=8", "train.micro_batch_size=2"
    )
    found = fit.changes(large, lambda one: job_ledgers(one, for_gpu=False))
    names = [change.candidate.name for change in found]
    assert {"recompute whole layers", "half the micro-batch", "train in bf16"} <= set(names)
    assert all(change.saved_bytes > 0 for change in found)
    by_bytes = [change.saved_bytes for change in fit.cheapest(found)]
    assert by_bytes == sorted(by_bytes, reverse=True) and len(by_bytes) == 3
    table = fit.fit_table(found)
    assert "train.micro_batch_size=1" in table
    for change in found:  # what is shown can be typed
        typed = load(None, change.typed().split()).config
        assert all(value_of(typed, key) == value for key, value in change.candidate.values.items())


def test_pictures_show_every_stage(pipeline: list[Ledger]) -> None:
    shown = report.bars(pipeline)
    assert len(shown.splitlines()) == 5
    assert "A" in shown and "P" in shown
    text = report.why(pipeline[0])
    assert "4 of chunk 0" in text or "3 of chunk 0" in text
    assert "GiB" in report.timeline_picture(pipeline[0])
    assert "layer_1" in report.layers(pipeline[0])


def test_deep_check_finds_what_only_building_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = config(*PIPELINE)
    assert deep_check(layout) == []
    from megatron_slm.stages import pretrain

    def broken(*_: object) -> Callable[..., object]:
        raise RuntimeError("planted in the loss")

    monkeypatch.setattr(pretrain, "loss_function", broken)
    found = deep_check(layout)
    assert len(found) == 6 and all("planted in the loss" in line for line in found)


def test_the_command_prints_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *SMALL, *PIPELINE, "--json", "--gpu", "h100-80gb"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in written["ranks"]] == [0, 2, 4, 6]
    for rank in written["ranks"]:
        assert sum(row["bytes"] for row in rank["rows"]) == rank["total_bytes"]
        assert rank["verdict"] == "fits"
    assert written["surroundings"]["capacity_bytes"] == pytest.approx(79.14 * GIB, rel=1e-6)


def test_the_command_explains_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["memory", *SMALL, "model.num_layers=2", "--cpu", "--why", "--layers"]) == 0
    found = capsys.readouterr()
    assert "worst moment" in found.out and "are taken" in found.err
    assert main(["memory", *SMALL, "--gpu", "h1000"]) == 2
    assert "h1000" in capsys.readouterr().err
    assert main(["memory", *SMALL, "--cpu", "--gpu", "h100-80gb"]) == 2
    assert main(["memory", *SMALL, "--stage", "3"]) == 2
