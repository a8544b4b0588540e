"""A run's log tells of its GPUs. The GPUs are made up (a FAKE driver under the real bindings), the ranks are not."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_slm.train import nvml
from tests import fake_nvml, runs

ASKED = ("log.telemetry=true", "train.global_batch_size=8", "train.eval_iters=0")


def test_record_console_file_and_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, two made-up GPUs, of which the second is throttled and has lost bits; read every second step."""
    monkeypatch.setenv("FAKE_NVML", "throttled ecc-errors")
    library = str(fake_nvml.built(tmp_path))
    plant = functools.partial(fake_nvml.load, library)
    run, host = tmp_path / "run", socket.gethostname()
    given = (*ASKED, "log.log_interval=2", "train.train_iters=5")
    assert runs.train(run, runs.corpus(tmp_path), 2, *given, plant=plant) == 0

    records = runs.records(run)
    assert [record["step"] for record in records if "telemetry" in record] == [2, 4, 5], "at the interval and the end"
    shown = records[-1]["telemetry"]
    assert (shown["ranks"], shown["power_watts"], shown["hottest_rank"]) == (2, 700.0, 1)
    assert shown["joules_per_token"] == pytest.approx(shown["joules_per_step"] / (8 * 32))
    assert shown["throttle"] == {"power cap": 1, "software thermal slowdown": 1}

    kept = runs.records(run, "telemetry.jsonl")
    assert [one["step"] for one in kept] == [2, 4, 5]
    assert [(rank["rank"], rank["host"], rank["celsius"]) for rank in kept[0]["ranks"]] == [
        (0, host, 60),
        (1, host, 65),
    ]
    assert kept[0]["ranks"][0]["throttle"] == ["application clocks"]

    lines = (run / "log.txt").read_text().splitlines()
    gpus = [at for at, text in enumerate(lines) if text.startswith(" gpus: 700 W | ")]
    assert len(gpus) == 3
    assert all("iteration" in lines[at - 1] or "goodput" in lines[at - 1] for at in gpus), "below the step's line"
    warnings = [text for text in lines if text.startswith("warning:")]
    assert len(warnings) == 3, "each once, however often it is read"
    assert all(f"rank 1 ({host})" in text for text in warnings)
    assert sum("uncorrected ECC errors" in text for text in warnings) == 1

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("telemetry/power_watts")] == [2, 4, 5]


def test_without_a_driver_one_line_says_so(tmp_path: Path) -> None:
    """Once, where it is asked for; a run on CPU ranks that does not ask says nothing."""
    opened, _ = nvml.opened()
    if opened is not None:
        opened.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")
    data = runs.corpus(tmp_path)
    assert runs.train(tmp_path / "asked", data, 1, *ASKED, "train.train_iters=2") == 0
    log = (tmp_path / "asked" / "log.txt").read_text()
    assert log.count("telemetry") == 1
    assert "telemetry: no rank's GPU can be asked: no NVIDIA driver answers" in log
    assert "warning" not in log
    assert not (tmp_path / "asked" / "telemetry.jsonl").exists()
    assert runs.train(tmp_path / "silent", data, 1, "train.train_iters=1") == 0
    assert "telemetry" not in (tmp_path / "silent" / "log.txt").read_text()
