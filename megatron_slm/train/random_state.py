"""Random state of one rank: dropout's generators, seeded so that ranks differ only where they must."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed, random as core_random


class RandomState:
    """Owner of torch's and core's generators on one rank.

    Args:
        seed: the run's seed.
        dp_rank, pp_rank: ranks with other tokens (counted over dp and cp together) and other stages draw different
            dropout masks. Ranks of one tp group share the default stream and differ in core's model-parallel stream, as
            core's layers expect.
    """

    def __init__(self, seed: int, *, dp_rank: int, pp_rank: int) -> None:
        self._identity = (seed, dp_rank, pp_rank)
        self.reseed(0)

    def reseed(self, step: int) -> None:
        """Start all streams from (seed, dp rank, pp rank, step)."""
        digest = hashlib.blake2b(repr((*self._identity, step)).encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little") % (2**31 - 2**16)  # core adds small offsets to it
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)

    def capture(self) -> dict[str, Any]:
        """All generator states, to be stored."""
        return {
            "torch": torch.get_rng_state(),
            "device": core_random._get_cuda_rng_state(),
            "tracker": get_cuda_rng_tracker().get_states(),
        }

    def restore(self, states: dict[str, Any]) -> None:
        """Continue all streams where ``capture`` found them."""
        torch.set_rng_state(states["torch"])
        core_random._set_cuda_rng_state(states["device"])
        get_cuda_rng_tracker().set_states(states["tracker"])
