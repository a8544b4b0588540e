"""Which steps of a run are profiled, on which ranks, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.config.option import option
from megatron_slm.errors import ConfigError

TORCH, NSYS, MEMORY = "torch", "nsys-capture", "memory"
TOOLS = (TORCH, NSYS, MEMORY)
EVERY = "all"


class Steps(NamedTuple):
    """Steps ``first`` to ``last``, both of them included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Steps:
        """``10:12`` (three steps), or ``10``.

        Raises:
            ConfigError: that is neither.
        """
        first, colon, last = text.partition(":")
        numbers = (first, last) if colon else (first, first)
        if not all(number.isdecimal() for number in numbers) or not 0 < int(numbers[0]) <= int(numbers[1]):
            raise ConfigError(
                f"{text!r} names no steps: write the first and the last one, counted from 1, as in 10:12, or one step, "
                "as in 10."
            )
        return cls(int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Where the time of some steps goes, in the run's ``profile/``."""

    profile_steps: str | None = option(
        None, "steps that are profiled, the first and the last: 10:12 is three steps; default none"
    )
    profile_ranks: tuple[str, ...] = option(("0",), "ranks that are profiled, or all")
    profile_tools: tuple[str, ...] = option(
        (TORCH,),
        "what they are profiled with: torch (torch's profiler, a Chrome trace), nsys-capture (NVTX ranges, and the "
        "steps marked for Nsight Systems, which launch/nsight.sh starts), memory (every allocation)",
    )

    @property
    def chosen(self) -> Steps | None:
        """The steps.

        Raises:
            ConfigError: ``profile_steps`` names none.
        """
        return Steps.parse(self.profile_steps) if self.profile_steps is not None else None

    def profiles(self, rank: int) -> bool:
        """Whether a rank is one of those that are profiled."""
        return EVERY in self.profile_ranks or str(rank) in self.profile_ranks
