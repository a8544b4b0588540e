"""Fitting: known constants come back; the file of rates is read back, and a damaged one refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_slm import cli
from megatron_slm.errors import ConfigError
from megatron_slm.plan.calibrate import Machine, calibrated, to_json_record
from megatron_slm.plan.fit import fitted, line, percentiles
from megatron_slm.plan.links import Span, ring_steps, volume
from megatron_slm.plan.rates import PUBLISHED, constants, from_record, rates_of, to_record

PEAK, MEMORY, LINK, LATENCY = 1e14, 1e12, 1e11, 5e-6


@dataclass(frozen=True)
class Timed:
    """A measurement without noise."""

    kind: str
    sizes: tuple[int, ...]
    median: float
    ranks: int = 1
    in_node: int = 1


def samples(*, nodes: bool = False) -> list[Timed]:
    """A machine of 60 % of its peak, half of that at sides of 50, and links of known speed."""
    found = []
    for m, n, k in [(s, s, s) for s in (256, 512, 1024, 2048, 4096)] + [(256, 4096, 4096)]:
        share = 0.6 * m / (m + 50) * n / (n + 50) * k / (k + 50)
        found.append(Timed("gemm", (m, n, k), 2 * m * n * k / PEAK / share + 1e-6))
    found.append(Timed("attention", (1024, 8, 64), 4 * 1024**2 * 8 * 64 / 2 / PEAK / 0.3))
    found += [Timed("streaming", (size,), size / MEMORY) for size in (10**8, 10**9)]
    found.append(Timed("op", (64,), 1e-6))
    for ranks, in_node in [(4, 4), *([(2, 1)] if nodes else [])]:
        for kind in ("all_reduce", "all_gather", "all_to_all"):
            for size in (10**5, 10**7, 10**9):
                sent = volume(kind, size, Span(ranks, in_node)).total
                seconds = ring_steps(kind, ranks) * LATENCY + sent / (LINK if in_node > 1 else LINK / 10)
                found.append(Timed(kind, (size,), seconds, ranks, in_node))
    return found


MACHINE = Machine("here", 4, 1, 80.0, bf16_tflops=PEAK / 1e12)


def test_known_constants_come_back() -> None:
    cluster, rates = calibrated(samples(nodes=True), dataclasses.replace(MACHINE, nodes=2), provenance="a test")
    assert rates.gemm_efficiency == pytest.approx(0.6, rel=0.02)
    assert rates.gemm_half_size == pytest.approx(50, rel=0.1)
    assert rates.attention_efficiency == pytest.approx(0.3)
    assert rates.memory_efficiency * cluster.memory_gb_per_second == pytest.approx(MEMORY / 1e9)
    assert rates.nvlink_efficiency * cluster.nvlink_gb_per_second == pytest.approx(LINK / 1e9, rel=0.01)
    assert rates.network_efficiency * cluster.network_gb_per_second == pytest.approx(LINK / 1e10, rel=0.01)
    assert rates.nvlink_latency_seconds == pytest.approx(LATENCY, rel=0.05)
    assert all(rates.provenance[name] == "measured: a test" for name in constants() if name != "host_seconds")
    low, high = rates.spread["gemm_efficiency"]
    assert low <= rates.gemm_efficiency * 1.03 and high >= rates.gemm_efficiency * 0.97


def test_what_was_not_measured_says_so() -> None:
    _, rates = calibrated(samples(), MACHINE, provenance="a test")
    assert rates.network_efficiency == PUBLISHED["hopper"].network_efficiency
    assert rates.provenance["network_efficiency"].startswith("not measured here")
    with pytest.raises(ConfigError, match="no measurement of gemm, streaming"):
        calibrated([one for one in samples() if one.kind in ("op", "attention")], MACHINE, provenance="")


def test_a_machine_without_a_data_sheet_reaches_less_than_all_of_its_peak() -> None:
    cluster, rates = calibrated(samples(), dataclasses.replace(MACHINE, bf16_tflops=None), provenance="a test")
    best = max(2 * s[0] * s[1] * s[2] / one.median for one in samples() if one.kind == "gemm" for s in [one.sizes])
    assert best / 1e12 < cluster.bf16_tflops
    assert rates.gemm_efficiency * cluster.bf16_tflops * 1e12 == pytest.approx(0.6 * PEAK, rel=0.03)


def test_the_file_is_read_back_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    cluster, rates = calibrated(samples(), MACHINE, provenance="a test")
    file.write_text(json.dumps(to_json_record(cluster, rates, samples(), {"host": "here"})))
    assert rates_of("whatever", file) == rates
    tokens = ["plan", "--model", "smollm2-135m", "--rates", str(file), "--global-batch-size", "8", "--json"]
    assert cli.main(tokens) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["cluster"] == {"name": "here", "gpus": 4, "gpus_per_node": 4}
    assert record["rates"]["gemm_efficiency"]["from"] == "measured: a test"


def test_published_rates_are_complete_and_say_where_they_come_from() -> None:
    for rates in PUBLISHED.values():
        assert set(rates.provenance) == set(constants())
        assert from_record(to_record(rates), "x") == rates
    with pytest.raises(ConfigError, match="architecture tesla: rates are known for ampere"):
        rates_of("tesla")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gemm_efficiency": "fast"}, "gemm_efficiency = 'fast'"),
        ({"op_seconds": 0}, "op_seconds = 0 must be a number above 0"),
        ({"memory_efficiency": float("nan")}, "memory_efficiency = nan"),
    ],
)
def test_damaged_rates_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": {**to_record(PUBLISHED["ampere"]), **change}}))
    with pytest.raises(ConfigError, match=message):
        rates_of("ampere", file)


def test_files_that_are_no_rates(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    for text, message in (("{", "cannot be read as JSON"), ("[]", "must hold a JSON object"), ("{}", "holds no rates")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            rates_of("ampere", file)


def test_a_line_has_no_negative_latency() -> None:
    assert line([1, 2, 4], [3, 5, 9]) == pytest.approx((1, 2))
    assert line([1, 2, 4], [1, 3, 7])[0] == 0.0


def test_fitting_finds_the_smallest_loss_and_names_its_source() -> None:
    start = PUBLISHED["ampere"]
    found = fitted(start, ["gemm_half_size"], lambda rates: abs(rates.gemm_half_size - 20), provenance="here")
    assert found.gemm_half_size == pytest.approx(20, rel=0.01)
    assert found.provenance["gemm_half_size"] == "here"
    assert found.provenance["memory_efficiency"] == start.provenance["memory_efficiency"]
    bounded = fitted(start, ["gemm_efficiency"], lambda rates: -rates.gemm_efficiency, provenance="here")
    assert bounded.gemm_efficiency <= 1.0


def test_percentiles() -> None:
    assert percentiles([float(value) for value in range(11)]) == (1.0, 9.0)
