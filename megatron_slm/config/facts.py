"""What a rule looks at: the configuration, the number of ranks, and where each value came from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.config.load import value_of
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show


@dataclass(frozen=True)
class Facts:
    """The subject of every rule."""

    config: RunConfig
    world_size: int
    """Ranks of the job; the fewest that hold the model where nothing says more."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    def cite(self, *keys: str) -> str:
        """The keys with their values and, where known, sources: ``train.seed = 3 (file x.yaml:2) and ...``."""
        return " and ".join(self._cite(key) for key in keys)

    def value(self, key: str) -> Any:
        """The key's value."""
        return value_of(self.config, key)

    def is_set(self, key: str) -> bool:
        """Whether a key differs from its default."""
        return bool(value_of(self.config, key) != value_of(_defaults(), key))

    def _cite(self, key: str) -> str:
        source = self.provenance.get(key)
        return f"{key} = {show(value_of(self.config, key))}" + (f" ({source})" if source else "")


@functools.cache
def _defaults() -> RunConfig:
    return RunConfig()


def nearest_divisors(name: str, number: int, value: int) -> str:
    """A sentence that names the divisors of ``number`` next to ``value``."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    below = [divisor for divisor in divisors if divisor <= value][-1:]
    above = [divisor for divisor in divisors if divisor > value][:1]
    return f"Nearest valid {name}: {' or '.join(map(str, below + above))}."
