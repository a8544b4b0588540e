"""What a run tells Prometheus, asked for over HTTP and read by Prometheus's own parser."""

from __future__ import annotations

import importlib.util
import math
import socket
import urllib.request
from pathlib import Path

import pytest

from megatron_slm.config import rules_packages
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.errors import LaunchError
from tests.unit.test_metrics_writer import BATCH, SEQ_LENGTH, TIMES, result, writer

needs_package = pytest.mark.skipif(
    not rules_packages.installed("prometheus_client"),
    reason=f"prometheus_client is not installed: pip install {rules_packages.PROMETHEUS}",
)
TELEMETRY = {"telemetry": {"power_watts": 700.0, "ecc_corrected": None, "throttle": {"power cap": 1}}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parsed(text: str) -> dict[str, float]:
    """Values by name; every one must bear the run's name."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"run"}
    return {sample.name: sample.value for sample in samples}


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return parsed(answer.read().decode())


@needs_package
def test_a_scrape_has_the_newest_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    log = writer(tmp_path / "run", prometheus_port=port, log_interval=1)
    log.before_run(None)
    assert f"metrics for Prometheus: http://127.0.0.1:{port}/metrics" in capsys.readouterr().out
    log.beside_step(TELEMETRY)
    log.after_step(None, result(1))
    log.beside_step({"goodput": 0.75})
    log.after_step(None, result(2, skipped=True, loss=math.nan))
    found = scraped(port)
    assert (found["mslm_step"], found["mslm_grad_norm"], found["mslm_goodput"]) == (2, 1.2344, 0.75)
    assert math.isnan(found["mslm_lm_loss"])
    assert found["mslm_tokens_per_second"] == pytest.approx(BATCH * SEQ_LENGTH / TIMES.total)
    assert found["mslm_memory_bytes"] > 0
    assert found["mslm_telemetry_power_watts"] == 700.0, "what a step does not tell stays"
    assert found["mslm_telemetry_throttle_power_cap"] == 1
    assert found["mslm_skipped_updates_total"] == 1
    log.after_step(None, result(3))
    found = scraped(port)
    assert (found["mslm_step"], found["mslm_skipped"], found["mslm_skipped_updates_total"]) == (3, 0, 1)
    log.after_run(None, 0)
    with pytest.raises(OSError, match="refused"):
        scraped(port)


@needs_package
def test_a_file_is_replaced_with_every_line(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "mslm.prom"
    log = writer(tmp_path / "run", prometheus_file=str(path), log_interval=2)
    log.before_run(None)
    for step in (1, 2, 3):
        log.after_step(None, result(step))
    found = parsed(path.read_text())
    assert (found["mslm_step"], found["mslm_lm_loss"]) == (2, pytest.approx(6.2))
    log.after_run(None, 0)
    assert parsed(path.read_text())["mslm_step"] == 3
    assert [one.name for one in path.parent.iterdir()] == ["mslm.prom"], "no temporary file stays"


@needs_package
def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    log = writer(tmp_path / "run", prometheus_file=str(tmp_path / "in the way" / "mslm.prom"), log_interval=1)
    log.after_step(None, result(1))
    log.after_run(None, 0)


@needs_package
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"log.prometheus_port={port} of 127.0.0.1 cannot be had"):
            writer(tmp_path / "run", prometheus_port=port)


def refused(*overrides: str) -> list[str]:
    resolved = load(None, ["data.data_path=a", *overrides])
    return violations(resolved.config, provenance=resolved.provenance)


@pytest.mark.parametrize("asked", ["log.prometheus_port=9000", "log.prometheus_file=a.prom"])
def test_without_the_package_a_check_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (said,) = refused(asked)
    assert "needs the package prometheus_client" in said
    assert f"pip install {rules_packages.PROMETHEUS}" in said


def test_an_address_without_a_port_is_refused() -> None:
    (said,) = refused("log.prometheus_address=0.0.0.0")
    assert "Set log.prometheus_port" in said


@needs_package
def test_installed_it_is_accepted() -> None:
    assert refused("log.prometheus_port=9000", "log.prometheus_address=0.0.0.0") == []
