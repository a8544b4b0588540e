"""From the configuration, or from held-out losses, to the shares of a mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from megatron_slm.config import mixture_text
from megatron_slm.data.config import DataConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.interleave import quantised
from megatron_slm.data.mixture import Phase

TEMPERATURE_PARTS = 1 << 16
"""Shares by size are multiples of one in so many: nobody has typed them, and the period is laid out quickly."""

ADAPTED_PARTS = 1000
"""Shares decided by losses are multiples of one in so many: a short period, laid out in a millisecond."""


def configured_phases(config: DataConfig, tokens: Mapping[str, int]) -> tuple[Phase, ...]:
    """The phases that ``config`` describes.

    Args:
        tokens: of every source that shares by weight or temperature; the replayed run is none of them.
    """
    first = mixture_text.weights(config.weights) or by_temperature(tokens, config.temperature)
    listed = [(0, first), *mixture_text.phases(config.phases)]
    return tuple(Phase.of(start, _with_replay(weights, config)) for start, weights in listed)


def by_temperature(tokens: Mapping[str, int], temperature: float) -> dict[str, Fraction]:
    """Shares in proportion to tokens^(1/temperature) (Arivazhagan et al., arXiv 1907.05019), in parts of 1/65536."""
    largest = max(tokens.values())
    weights = [
        Fraction(count) if temperature == 1 else Fraction((count / largest) ** (1 / temperature))
        for count in tokens.values()
    ]
    parts = quantised(weights, TEMPERATURE_PARTS)
    return {name: Fraction(part, TEMPERATURE_PARTS) for name, part in zip(tokens, parts, strict=True)}


def reweighted(weights: Mapping[str, Fraction], losses: Mapping[str, float], strength: float) -> dict[str, Fraction]:
    """Shares that favour what the model knows least: weight x exp(strength x (held-out loss - weighted mean)).

    The result is in parts of 1/1000, and no source that had a share loses all of it. Sources without a loss keep
    theirs; a loss that is not finite changes nothing. (The step of Xie et al., "DoReMi", arXiv 2305.10429, on losses
    in place of excess losses.)
    """
    scored = [name for name, weight in weights.items() if weight > 0 and name in losses]
    total = sum((weights[name] for name in scored), Fraction(0))
    if len(scored) < 2 or not all(math.isfinite(losses[name]) for name in scored):
        return dict(weights)
    mean = sum(float(weights[name] / total) * losses[name] for name in scored)
    exponents = {name: strength * (losses[name] - mean) for name in scored}
    # Only ratios matter: the largest factor is 1, so that none overflows, and the smallest is not 0, which would kill.
    highest = max(exponents.values())
    raised = {name: weights[name] * Fraction(math.exp(max(-50.0, exponents[name] - highest))) for name in scored}
    scale = total / sum(raised.values(), Fraction(0))
    wanted = [raised[name] * scale if name in raised else weight for name, weight in weights.items()]
    parts = quantised(wanted, ADAPTED_PARTS)
    return {name: Fraction(part, ADAPTED_PARTS) for name, part in zip(weights, parts, strict=True)}


def after_validation(cursor: Cursor, losses: Mapping[str, float], strength: float) -> Cursor:
    """The cursor with the shares that held-out ``losses`` by source ask for, from here to the next configured phase.

    They start from the configured shares each time, so that what comes out depends on the losses and on nothing before
    them: a source that stays hard gets more, but not ever more.
    """
    return cursor.with_phase(reweighted(cursor.order.configured_at(cursor.consumed_samples).shares, losses, strength))


def _with_replay(weights: Mapping[str, Fraction], config: DataConfig) -> dict[str, Fraction]:
    """The weights as shares, with the part of the replayed run taken from each of them alike."""
    total = sum(weights.values())
    share = Fraction(repr(config.replay_share)) if config.replay_run is not None else Fraction(0)
    shares = {name: weight / total * (1 - share) for name, weight in weights.items()}
    return {**shares, mixture_text.REPLAY: share} if share else shares
