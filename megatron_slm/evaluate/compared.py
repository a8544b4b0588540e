"""Which numbers of each kind of task two models are compared by. No torch: two results are compared without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Compared(NamedTuple):
    """One number of a kind of task that two models are compared by: a sum over another one.

    Attributes:
        sum, over: keys of an item's values; ``over`` None counts items.
        larger_is_better: else smaller is.
    """

    name: str
    sum: str
    over: str | None
    larger_is_better: bool


COMPARED: Mapping[str, tuple[Compared, ...]] = {
    "held_out": (Compared("loss", "nats", "tokens", larger_is_better=False),),
    "choice": tuple(
        Compared(f"accuracy ({name})", f"right_{name}", None, larger_is_better=True)
        for name in ("raw", "token", "byte")
    ),
    "generation": (
        Compared("pass@1", "passed", "samples", larger_is_better=True),
        Compared("score", "score", "samples", larger_is_better=True),
    ),
    "golden": (Compared("in range", "in_range", None, larger_is_better=True),),
}
