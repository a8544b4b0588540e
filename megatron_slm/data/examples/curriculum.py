"""Easy before hard: the examples of one source in parts that come one after another, as phases of a mixture."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.mixture import MixtureOrder, Phase, Source


def curriculum(name: str, rows: ExampleRows, parts: int, *, sorted_by: str) -> dict[str, ExampleRows]:
    """``rows`` sorted and cut into ``parts`` of equally many examples, ``name-1`` the easiest.

    Args:
        sorted_by: "length", or "score" (``mslm data examples --score-key``).

    Raises:
        DataError: an example has no score, or there are fewer examples than parts.
    """
    return {
        f"{name}-{number + 1}": dataclasses.replace(rows, part=(number, parts), sorted_by=sorted_by)
        for number in range(parts)
    }


def curriculum_order(parts: dict[str, ExampleRows], seed: int) -> MixtureOrder:
    """Every row of the first part once, then of the second, and so on; after them all parts by their sizes, for ever.

    Inside a part the order is random, as in any source.
    """
    sources = tuple(Source(name, rows.order(seed)) for name, rows in parts.items())
    phases, start = [], 0
    for name, rows in parts.items():
        phases.append(Phase.of(start, {name: Fraction(1)}))
        start += rows.num_samples
    phases.append(Phase.of(start, {name: Fraction(rows.num_samples) for name, rows in parts.items()}))
    return MixtureOrder(sources, tuple(phases))
