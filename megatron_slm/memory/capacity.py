"""What a GPU's memory holds beside torch's tensors, and how much of it torch sees. Every number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB = 1 << 30
MIB = 1 << 20

SEEN_BY_TORCH_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "a100-40gb": round(39.39 * GIB),
        "a100-80gb": round(79.14 * GIB),
        "h100-80gb": round(79.14 * GIB),
        "h200": round(139.80 * GIB),
        "b200": round(178.35 * GIB),
        "gb200": round(184.31 * GIB),
    }
)
"""Total capacity as torch's out-of-memory messages print it, the smaller value where they differ; A100-40GB as
BLOOM's notes have it. Not the nominal gigabytes."""


@dataclass(frozen=True)
class Surroundings:
    """Memory of a device that is not torch's allocated bytes; (low, expected, high) in bytes where it is uncertain.

    Attributes:
        capacity_bytes: what torch sees; None where the device is not known.
        context_bytes: CUDA context and kernels: 1,271 MiB (V100) to 1,573 MiB (A100-40) in BLOOM's training notes.
        communicator_bytes: of one NCCL communicator: 544 to 688 MB for the first (nccl issue 964), less for others.
        communicators: process groups of more than one rank that communicate.
        fragmentation: reserved over allocated bytes: 2.8 to 9.3 %, mean 4.8 % in clean runs on one node (SimuMax v1.2,
            43 runs on B200). With pipelines over many nodes it is more: of 454 runs none ran out whose estimate was
            under 80 % of the memory, but above that some did (Fujii et al., arXiv 2411.06465). With the context and the
            communicators the upper bound leaves that fifth.
        activation_error: relative, of what is traced through declared kernels.
    """

    capacity_bytes: int | None
    communicators: int
    context_bytes: tuple[int, int, int] = (400 * MIB, 900 * MIB, 1600 * MIB)
    communicator_bytes: tuple[int, int, int] = (64 * MIB, 160 * MIB, 688 * MIB)
    fragmentation: tuple[float, float, float] = (0.0, 0.048, 0.2)
    activation_error: float = 0.02

    def beside(self, rounding: int, allocated: int) -> dict[str, tuple[int, int, int]]:
        """(low, expected, high) of everything that is not in ``allocated`` bytes.

        Args:
            rounding: what the allocator adds to the blocks.
        """
        communicator = [size * self.communicators for size in self.communicator_bytes]
        fragments = [round(share * (allocated + rounding)) for share in self.fragmentation]
        return {
            "allocator rounding": (rounding, rounding, rounding),
            "fragmentation": (fragments[0], fragments[1], fragments[2]),
            "NCCL": (communicator[0], communicator[1], communicator[2]),
            "CUDA context": self.context_bytes,
        }
