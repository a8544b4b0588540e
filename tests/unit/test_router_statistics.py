"""The record of the experts' load: what each number means at its ends, and how it reaches the log."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.metrics import read_records
from megatron_slm.train.router_statistics import BY_LAYER, expert_layers, router_record
from tests.unit.test_metrics_writer import result, writer

# Columns behind the loads: pairs dropped, tokens, entropy in nats, balancing loss, squared log-partition.
EVEN = [5.0] * 4 + [0.0, 10.0, 10 * math.log(4), 10.0, 40.0]
ONE_SIDED = [10.0, 10.0, 0.0, 0.0] + [5.0, 10.0, 0.0, 20.0, 0.0]


def test_even_and_one_sided_loads_have_their_known_values() -> None:
    record = router_record(["layer_0", "layer_1"], [EVEN, ONE_SIDED], has_loss=True)
    expected = {
        "load_max_over_mean": (1.0, 2.0),
        "load_entropy": (1.0, 0.5),  # two of four experts: log 2 / log 4
        "probability_entropy": (1.0, 0.0),
        "dropped_share": (0.0, 0.25),
        "aux_loss": (1.0, 2.0),
        "z_loss": (4.0, 0.0),
    }
    assert set(record) == {f"router_{name}" for name in expected} | {BY_LAYER}
    for name, (first, second) in expected.items():
        by_layer = record[BY_LAYER][f"router_{name}"]
        assert by_layer == pytest.approx({"layer_0": first, "layer_1": second})
        assert record[f"router_{name}"] == pytest.approx((first + second) / 2)


def test_a_layer_that_counted_nothing_and_a_loss_that_is_none_are_left_out() -> None:
    record = router_record(["layer_0", "mtp_1"], [EVEN, [0.0] * 9], has_loss=False)
    assert "router_aux_loss" not in record and set(record[BY_LAYER]["router_z_loss"]) == {"layer_0"}
    assert router_record(["layer_0"], [[7.0, 0.0, 7.0, 0.0, 7.0, 0.0]], has_loss=True)["router_load_entropy"] == 0.0


def test_the_layers_are_those_with_experts() -> None:
    model = ModelConfig(num_layers=5, num_moe_experts=4, moe_layer_freq=2, moe_first_dense_layers=1)
    assert expert_layers(model) == ["layer_2", "layer_4"]
    assert expert_layers(replace(model, mtp_num_layers=2))[2:] == ["mtp_1", "mtp_2"]


def test_the_line_the_record_and_tensorboard_show_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = writer(tmp_path)
    for step in (1, 2, 3):
        if step == 2:
            record = router_record(["layer_0"], [[5.0, 5.0, 0.0, 10.0, 0.0, 0.0, math.nan]], has_loss=False)
            log.beside_step(record)
        log.after_step(None, result(step))
    log.after_run(None, 0)
    first, second, third = read_records(tmp_path / "metrics.jsonl")
    assert second["router_load_max_over_mean"] == 1.0 and second["router_z_loss"] is None
    assert second[BY_LAYER]["router_dropped_share"] == {"layer_0": 0.0}
    assert not any(key.startswith("router") for key in first | third)
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    printed = capsys.readouterr().out
    assert printed.count("router load max over mean: 1.000000E+00 | router load entropy: 1.000000E+00") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("router load entropy")] == [2]
    assert "router z loss" not in events.Tags()["scalars"]
