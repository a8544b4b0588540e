"""Numbers that say whether a stored tensor is sound."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.train.payload import read_tensor
from megatron_slm.train.payload_index import read_index


def statistics(path: Path, name: str) -> str:
    """Smallest, largest, mean and standard deviation of the finite elements, and how many are not finite.

    Raises:
        CheckpointError: the checkpoint has no such tensor.
    """
    tensor = read_tensor(path, read_index(path), name).double()
    finite = tensor[tensor.isfinite()]
    others = tensor.numel() - finite.numel()
    if not finite.numel():
        return f"{name}: none of its {tensor.numel()} elements is finite"
    low, high, mean, deviation = finite.min(), finite.max(), finite.mean(), finite.std(correction=0)
    return (
        f"{name}: min {low:.6g}, max {high:.6g}, mean {mean:.6g}, std {deviation:.6g}, "
        f"{others} of {tensor.numel()} not finite"
    )
