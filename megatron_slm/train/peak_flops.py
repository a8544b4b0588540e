"""Dense matrix throughput of known GPUs, for model FLOPs utilisation. No torch."""

from __future__ import annotations

# Dense bf16 tensor-core FLOP/s without sparsity (the data sheets' headline numbers are with 2:4 sparsity and are halved
# here), by a fragment of the name that CUDA reports; a longer fragment comes before a shorter one it contains.
#   A100            NVIDIA A100 Tensor Core GPU data sheet, 2021: 312 TFLOPS dense
#   H100 SXM, NVL, PCIe   NVIDIA H100 Tensor Core GPU data sheet, 2023: 1979, 1671, 1513 TFLOPS with sparsity
#   H200 SXM, NVL   NVIDIA H200 Tensor Core GPU data sheet, 2024: 1979, 1671 TFLOPS with sparsity
#   B200            NVIDIA DGX B200 data sheet, 2024: 72 PFLOPS FP8 with sparsity for 8 GPUs; bf16 is half of FP8
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("A100", 312e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.5e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("B200", 2250e12),
)


def peak_flops(device_name: str, params_dtype: str) -> float | None:
    """Peak FLOP/s of one device, or ``None`` where no published number applies.

    Args:
        device_name: as ``torch.cuda.get_device_name`` reports it, for example ``NVIDIA H200``.
        params_dtype: dtype of the matrix products; a peak is known for ``bfloat16`` alone.
    """
    if params_dtype != "bfloat16":
        return None
    # GB200 is another product (the same die at another power limit), and a slice of a GPU has a part of its peak.
    words = device_name.replace("-", " ").split()
    if "MIG" in words or "GB200" in words:
        return None
    name = " ".join(words)
    return next((flops for fragment, flops in PEAK_BF16_FLOPS if fragment in name), None)
