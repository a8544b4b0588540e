"""What is made of the sensors' readings, and the sensors themselves through the real bindings of a FAKE driver."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.train import nvml
from megatron_slm.train.nvml import UNKNOWN, Reading
from megatron_slm.train.telemetry import Sample, line, missing_text, sample_between, summary, warning_text
from tests import fake_nvml

HOSTS = ["n1", "n1", "n2"]

PROGRAM = (
    "import json, time\n"
    "from megatron_slm.train import nvml\n"
    "opened, missing = nvml.opened()\n"
    "assert opened is not None, missing\n"
    "handles = [nvml.handle_of(opened, uuid=uuid, index=1) for uuid in ('fake-1', None, 'of-another-machine')]\n"
    "before = nvml.read(opened, handles[0])\n"
    "time.sleep(0.05)\n"
    "print(json.dumps([before, nvml.read(opened, handles[1]), handles[2]]))"
)
"""Reads the second GPU twice, by its UUID and by its number, and looks for one that is not there."""


def sample(**known: float) -> Sample:
    return Sample(**{**dict.fromkeys(Sample._fields, UNKNOWN), **known})


def test_energy_is_the_counters_difference() -> None:
    before = Reading(seconds=10.0, power_watts=300.0, energy_joules=1000.0, nvlink_bytes=1e9, pcie_bytes=5.0)
    now = Reading(seconds=14.0, power_watts=500.0, energy_joules=3000.0, nvlink_bytes=9e9, celsius=71.0)
    found = sample_between(before, now)
    assert (found.energy_joules, found.power_watts, found.celsius) == (2000.0, 500.0, 71.0)
    assert found.nvlink_bytes_per_second == 2e9
    assert math.isnan(found.pcie_bytes_per_second), "what one of two readings does not know is not known"


def test_without_a_counter_energy_is_power_over_time() -> None:
    found = sample_between(Reading(seconds=10.0, power_watts=300.0), Reading(seconds=14.0, power_watts=500.0))
    assert found.energy_joules == 1600.0


def test_the_summary_has_sums_and_the_worst_rank() -> None:
    samples = [
        sample(power_watts=300.0, energy_joules=600.0, celsius=60.0, sm_clock_mhz=1980.0, throttle_bits=0x2),
        sample(power_watts=400.0, energy_joules=800.0, celsius=71.0, sm_clock_mhz=1410.0, throttle_bits=0x24),
        sample(),
    ]
    shown = summary(samples, steps=10, tokens=70_000)
    assert (shown["ranks"], shown["power_watts"], shown["joules_per_step"]) == (2, 700.0, 140.0)
    assert shown["joules_per_token"] == pytest.approx(0.02)
    assert (shown["hottest_rank"], shown["hottest_celsius"]) == (1, 71.0)
    assert (shown["slowest_rank"], shown["slowest_sm_clock_mhz"]) == (1, 1410.0)
    assert shown["throttled_ranks"] == 1, "clocks that somebody has chosen are not held down"
    assert shown["throttle"] == {"power cap": 1, "software thermal slowdown": 1}
    assert shown["ecc_corrected"] is None and shown["least_utilisation"] is None
    json.dumps(shown, allow_nan=False)
    assert line(shown, samples, HOSTS) == (
        "gpus: 700 W | 0.02 J/token | hottest 71 C (rank 1, n1) | slowest 1410 MHz (rank 1, n1) | power cap on 1 rank"
        " | software thermal slowdown on 1 rank"
    )


def test_every_reason_has_a_name() -> None:
    import pynvml

    constants = [value for name, value in vars(pynvml).items() if name.startswith("nvmlClocksThrottleReason") and value]
    named = set(nvml.REASONS)
    assert named == {value for value in constants if value & (value - 1) == 0}
    assert nvml.reasons(0x1 | 0x40) == ("idle", "hardware thermal slowdown")
    assert nvml.reasons(UNKNOWN) == ()


def test_ranks_without_a_gpu_are_said_once_with_the_reason() -> None:
    assert missing_text(["no driver"] * 3, HOSTS) == "telemetry: no rank's GPU can be asked: no driver."
    assert missing_text(["", "", "no driver"], HOSTS) == (
        "telemetry: the GPU of rank 2 (n2) cannot be asked: no driver."
    )


def test_a_warning_names_few_ranks_and_counts_the_others() -> None:
    said = warning_text("power cap", range(20), ["h"] * 20)
    assert "rank 7 (h) and 12 more" in said and "rank 8" not in said
    assert "reset or replaced" in warning_text("3 uncorrected ECC errors", [1], HOSTS)


def test_the_sensors_of_a_fake_driver(tmp_path: Path) -> None:
    found = probed(fake_nvml.environment(tmp_path, "throttled ecc-errors"))
    assert (found.power_watts, found.celsius, found.sm_clock_mhz) == (400.0, 65.0, 1880.0)
    assert (found.memory_clock_mhz, found.utilisation, found.throttle_bits) == (2619.0, 0.9, 0x24)
    assert (found.ecc_uncorrected, found.nvlink_errors) == (3.0, 0.0)
    assert found.nvlink_bytes_per_second == pytest.approx(2 << 30, rel=0.1)
    assert math.isnan(found.pcie_bytes_per_second), "a counter that this GPU does not have"
    assert found.energy_joules > 0.05 * 400 * 0.9


def test_a_fake_driver_without_a_counter_of_energy(tmp_path: Path) -> None:
    assert probed(fake_nvml.environment(tmp_path, "no-energy")).energy_joules > 0.05 * 400 * 0.9


def test_without_a_driver_nothing_is_opened() -> None:
    opened, missing = nvml.opened()
    if opened is not None:
        opened.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")
    assert missing.startswith("no NVIDIA driver answers")


def probed(environment: dict[str, str]) -> Sample:
    """A sample of a GPU, read in a process that finds the fake library."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    before, now, elsewhere = json.loads(ended.stdout)
    assert elsewhere is None
    return sample_between(Reading(*before), Reading(*now))
