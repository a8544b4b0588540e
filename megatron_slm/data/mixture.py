"""The order of a run over one or several sources: which source a position belongs to, and which of its samples.

A position counts the samples of the whole run. Every source has its own order and its own epoch; the mixture has none.
The shares hold in phases. In each, ``interleave.py`` lays out whose turn it is, so that at every prefix of the run each
source is within one sample of what its shares amount to. A phase begins with what each source is owed from before it
and makes up for it at once; where a source that was owed loses most of its share, or all, the distance may pass one
sample by a fraction (``tests/bench/mixture.py`` measures it), because nobody could know of the change before. All of it
follows from the phases alone, so the sample at any position is found in O(1), whatever was read before.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megatron_slm.config.mixture_text import REPLAY
from megatron_slm.data.interleave import LONGEST_PERIOD, Turns, reduced, turns
from megatron_slm.data.order import SampleOrder

MIXTURE_VERSION = 2
"""Raised when the same sources and phases would give another order; stored in every cursor. 1 knew one corpus only."""

ROUNDED = f"the weights need finer shares than 1/{LONGEST_PERIOD:,}, so these are rounded to multiples of that"


@dataclass(frozen=True, slots=True)
class SampleId:
    """A sample at a time: of which source, how often that source has been passed, and which of its samples."""

    source: str
    epoch: int
    index: int


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture. Its name is for people: the order depends on what is inside."""

    name: str
    order: SampleOrder


@dataclass(frozen=True)
class Phase:
    """Shares from position ``start`` on: of every source that has one, integers without a common divisor.

    ``adaptive`` phases were decided by the run itself (loss-aware sampling) and not by its configuration. Those that
    are ``rounded`` stand for weights whose shares need more than ``LONGEST_PERIOD`` parts.
    """

    start: int
    parts: tuple[tuple[str, int], ...]
    adaptive: bool = False
    rounded: bool = field(default=False, compare=False)

    @staticmethod
    def of(start: int, weights: Mapping[str, Fraction], *, adaptive: bool = False) -> Phase:
        """The phase with the given weights, on any scale; sources with weight 0 are left out."""
        names = sorted(name for name, weight in weights.items() if weight > 0)
        assert names, f"a phase has at least one source with a weight above 0: {dict(weights)}"
        parts = reduced([weights[name] for name in names])
        wanted, total = sum(weights[name] for name in names), sum(parts)
        rounded = any(weights[name] * total != part * wanted for name, part in zip(names, parts, strict=True))
        return Phase(start, tuple(zip(names, parts, strict=True)), adaptive, rounded)

    @property
    def shares(self) -> dict[str, Fraction]:
        """What the mixture aims at, of every source that has a share; the sum is 1."""
        total = sum(part for _, part in self.parts)
        return {name: Fraction(part, total) for name, part in self.parts}

    @property
    def share_texts(self) -> dict[str, str]:
        """The shares to read, rounded to four digits."""
        return {name: f"{float(share):.4g}" for name, share in self.shares.items()}

    @property
    def shares_text(self) -> str:
        """``code 0.3, kjv 0.7``."""
        return ", ".join(f"{name} {share}" for name, share in self.share_texts.items())

    @property
    def weights_text(self) -> str:
        """``code=0.3 kjv=0.7``, to be typed: as decimals where they are exact, else as parts. Replay has no weight."""
        exact = all(Fraction(text) == self.shares[name] for name, text in self.share_texts.items())
        typed = {name: self.share_texts[name] if exact else str(part) for name, part in self.parts}
        return " ".join(f"{name}={number}" for name, number in typed.items() if name != REPLAY)

    @property
    def entry(self) -> str:
        """This phase as an entry of ``data.phases``."""
        return f"{self.start}: {self.weights_text}"


@dataclass(frozen=True)
class _Span:
    """A phase in force, ready for look-ups.

    Attributes:
        numbers: int64, the source of the run that each source of ``turns`` is.
        base: int64 [sources of the run], samples of each before ``start``.
    """

    start: int
    numbers: np.ndarray
    turns: Turns
    base: np.ndarray

    def counts(self, position: int) -> np.ndarray:
        """Samples of every source before ``position``, int64 [sources of the run]."""
        counts = self.base.copy()
        counts[self.numbers] += self.turns.counts(position - self.start)
        return counts


@dataclass(frozen=True)
class MixtureOrder:
    """The order of a run. One corpus is a mixture of one.

    Args:
        sources: with orders of one sequence length.
        phases: by start, the first at 0; of two at one position the later one in the list holds.
    """

    sources: tuple[Source, ...]
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        assert len(set(names)) == len(names) > 0, f"sources are told apart by name: {names}"
        assert len({source.order.seq_length for source in self.sources}) == 1, "samples of a mixture have one length"
        starts = [phase.start for phase in self.phases]
        assert starts and starts[0] == 0 and starts == sorted(starts), f"phases start at 0 and follow: {starts}"
        assert all(name in names for phase in self.phases for name, _ in phase.parts), "phases share known sources"

    @staticmethod
    def of_one(name: str, order: SampleOrder) -> MixtureOrder:
        """The order of a run over a single corpus."""
        return MixtureOrder((Source(name, order),), (Phase(0, ((name, 1),)),))

    @property
    def seq_length(self) -> int:
        """Tokens of one sample."""
        return self.sources[0].order.seq_length

    def sample_id(self, position: int) -> SampleId:
        """The sample at ``position`` (0, 1, 2, ... since the start of the run)."""
        assert position >= 0, f"position {position} is before the start of training"
        span = self._spans[self._span_at(position)]
        place, cycle = span.turns.place(position - span.start)
        turn = span.turns.source[place]
        number = int(span.numbers[turn])
        local = int(span.base[number]) + int(span.turns.rank[place]) + cycle * int(span.turns.per_cycle[turn])
        return SampleId(self.sources[number].name, *self.sources[number].order.sample_id(local))

    def sample_ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source numbers, epochs and indices, each int64 [stop - start], of a range of positions."""
        assert 0 <= start <= stop, f"positions {start}..{stop} are not a range"
        numbers = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            at = self._span_at(position)
            end = min(stop, self._spans[at + 1].start) if at + 1 < len(self._spans) else stop
            span = self._spans[at]
            numbers[position - start : end - start] = span.numbers[
                span.turns.sources(position - span.start, end - span.start)
            ]
            position = end
        epochs, indices = np.empty_like(numbers), np.empty_like(numbers)
        # The samples of one source in a range of positions are a range of its own positions.
        first = self.counts(start)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(numbers == number)
            local = int(first[number])
            epochs[mine], indices[mine] = source.order.sample_ids(local, local + len(mine))
        return numbers, epochs, indices

    def counts(self, position: int) -> np.ndarray:
        """Samples of every source in the positions before ``position``, int64 [sources]."""
        return self._spans[self._span_at(position)].counts(position)

    def phase_at(self, position: int) -> Phase:
        """The phase that the sample at ``position`` belongs to."""
        return self.phases[self._span_at(position)]

    def configured_at(self, position: int) -> Phase:
        """The configured phase that holds at ``position``, whatever the run has decided since it began."""
        return [phase for phase in self.phases if phase.start <= position and not phase.adaptive][-1]

    def with_phase(self, phase: Phase) -> MixtureOrder:
        """This order with another phase, which takes the place of an equally adaptive one at the same position."""
        kept = [old for old in self.phases if (old.start, old.adaptive) != (phase.start, phase.adaptive)]
        phases = sorted([*kept, phase], key=lambda one: (one.start, one.adaptive))
        return dataclasses.replace(self, phases=tuple(phases))

    def _span_at(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [phase.start for phase in self.phases]

    @functools.cached_property
    def _spans(self) -> tuple[_Span, ...]:
        spans: list[_Span] = []
        base = np.zeros(len(self.sources), dtype=np.int64)
        owed = [Fraction(0)] * len(self.sources)
        shared: set[int] = set()
        # By content: neither the names of the sources nor the order in which they are listed decides whose turn it is.
        by_content = sorted(range(len(self.sources)), key=lambda number: self.sources[number].order.digest)
        for phase, following in itertools.zip_longest(self.phases, self._starts[1:]):
            shares = [phase.shares.get(source.name, Fraction(0)) for source in self.sources]
            numbers = [number for number in by_content if shares[number]]
            parts = dict(phase.parts)
            shared.update(numbers)
            table = turns(
                tuple(parts[self.sources[number].name] for number in numbers),
                tuple(owed[number] for number in numbers),
                len(shared),
                places=None if following is None else following - phase.start,
            )
            spans.append(_Span(phase.start, np.array(numbers), table, base))
            if following is not None:
                base = spans[-1].counts(following)
                grown = (base - spans[-1].base).tolist()
                owed = [
                    before + share * (following - phase.start) - count
                    for before, share, count in zip(owed, shares, grown, strict=True)
                ]
        return tuple(spans)


def described(order: MixtureOrder) -> list[str]:
    """What a run's log says of its order: the sources, and the shares of every phase as they are aimed at."""
    sizes = ", ".join(f"{source.name} of {source.order.num_samples:,}" for source in order.sources)
    lines = [f"samples of {order.seq_length} tokens an epoch: {sizes}"]
    if len(order.sources) > 1:
        lines += [
            f"shares from sample {phase.start} on: {phase.shares_text}"
            + (" (by held-out loss)" if phase.adaptive else "")
            + (f"; {ROUNDED}" if phase.rounded else "")
            for phase in order.phases
        ]
    return lines
