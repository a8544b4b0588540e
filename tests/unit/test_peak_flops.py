"""A peak is given only for a device and number format with a published one."""

from __future__ import annotations

import pytest

from megatron_slm.train.metrics import Throughput
from megatron_slm.train.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125.0),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert peak_flops(name, "bfloat16") == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "GRID A100-20C",
    ],
)
def test_no_number_is_made_up(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_fp32_is_not_taken_for_tf32() -> None:
    assert peak_flops("NVIDIA H200", "float32") == 67e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12


def test_other_formats_have_no_peak() -> None:
    assert peak_flops("NVIDIA H200", "float64") is None


def test_utilisation_is_the_share_of_the_peak() -> None:
    throughput = Throughput.of(1e9, 8, device_name="NVIDIA H200", params_dtype="bfloat16")
    # 8 ranks at half of their peak for one second
    assert throughput.utilisation(0.5 * 8 * 989.5e12 / 1e9, 1.0) == pytest.approx(0.5)
