"""Dense matrix throughput of known GPUs, for model FLOPs utilisation. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of one device, without the 2:4 sparsity that the data sheets' headline numbers are with."""

    bfloat16: float
    """Tensor cores."""
    float32: float
    """The vector units: torch multiplies fp32 matrices there, unless it is told to round them to TF32."""


# By words of the name that CUDA reports; an entry with more words comes before one whose words it contains.
#   A100            NVIDIA A100 Tensor Core GPU data sheet, 2021
#   H100            NVIDIA H100 Tensor Core GPU data sheet, 2023; bf16 1979 (SXM), 1671 (NVL), 1513 (PCIe) with sparsity
#   H200            NVIDIA H200 Tensor Core GPU data sheet, 2024; bf16 1979 (SXM), 1671 (NVL) with sparsity
#   B200            NVIDIA Blackwell data sheet, 2024, HGX B200: bf16 4500 with sparsity
#   L40S, A10       NVIDIA L40S data sheet, 2023; NVIDIA A10 Tensor Core GPU data sheet, 2021
PEAKS: tuple[tuple[frozenset[str], Peak], ...] = (
    (frozenset({"A100"}), Peak(312.0, 19.5)),
    (frozenset({"H100", "NVL"}), Peak(835.5, 60.0)),
    (frozenset({"H100", "PCIe"}), Peak(756.5, 51.0)),
    (frozenset({"H100"}), Peak(989.5, 67.0)),
    (frozenset({"H200", "NVL"}), Peak(835.5, 60.0)),
    (frozenset({"H200"}), Peak(989.5, 67.0)),
    (frozenset({"B200"}), Peak(2250.0, 75.0)),
    (frozenset({"L40S"}), Peak(362.05, 91.6)),
    (frozenset({"A10"}), Peak(125.0, 31.2)),
)


def peak_flops(device_name: str, params_dtype: str) -> float | None:
    """Peak FLOP/s of one device, or ``None`` where no published number applies.

    Args:
        device_name: as ``torch.cuda.get_device_name`` reports it, for example ``NVIDIA H200``.
        params_dtype: dtype of the matrix products; peaks are known for ``bfloat16`` and ``float32``.
    """
    words = frozenset(device_name.replace("-", " ").split())
    # A slice of a GPU (multi-instance, virtual) has a part of the peak.
    if params_dtype not in Peak._fields or words & {"MIG", "GRID"}:
        return None
    peak = next((peak for needed, peak in PEAKS if needed <= words), None)
    return None if peak is None else 1e12 * float(getattr(peak, params_dtype))
