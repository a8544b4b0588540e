"""Rules about where the samples come from: one corpus or a mixture, its shares, replay, and short before long."""

from __future__ import annotations

import decimal
import difflib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_slm.config import mixture_text
from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.errors import ConfigError

PATH, SOURCES, WEIGHTS, TEMPERATURE = "data.data_path", "data.sources", "data.weights", "data.temperature"
PHASES, LENGTHS, STRENGTH = "data.phases", "data.length_schedule", "data.loss_aware_strength"
RUN, SHARE = "data.replay_run", "data.replay_share"


def one_or_many(facts: Facts) -> Iterator[str]:
    """A run reads one corpus or several named ones."""
    data = facts.config.data
    if data.data_path is not None and data.sources:
        yield (
            f"{facts.cite(PATH, SOURCES)} exclude each other. Name the former among the sources, or leave one of them "
            "out."
        )
    for key in (WEIGHTS, PHASES, TEMPERATURE):
        if facts.is_set(key) and not data.sources:
            yield (
                f"{facts.cite(key)}: there are no sources to share between. Name them with {SOURCES}=NAME=DIR,..., or "
                f"leave {key} out."
            )


def sources(facts: Facts) -> Iterator[str]:
    """Every source has a name and a directory of its own."""
    names, problem = _read(facts, SOURCES, mixture_text.sources)
    if names is None:
        yield problem
        return
    if mixture_text.REPLAY in names:
        yield (
            f"{facts.cite(SOURCES)}: the name {mixture_text.REPLAY} belongs to the samples of {RUN}. Choose another "
            "name."
        )
    places: dict[Path, str] = {}
    for name, path in names.items():
        if (twin := places.setdefault(Path(path).resolve(), name)) != name:
            yield (
                f"{facts.cite(SOURCES)}: {twin} and {name} are the same directory, so its samples would come twice. "
                "Leave one out, and give the other both weights."
            )


def shares(facts: Facts) -> Iterator[str]:
    """Weights are numbers of known sources, and every source has one above 0 at some time."""
    names, _ = _read(facts, SOURCES, mixture_text.sources)
    if not names:
        return  # another rule speaks already
    weights, problem = _read(facts, WEIGHTS, mixture_text.weights)
    phases, other_problem = _read(facts, PHASES, mixture_text.phases)
    if weights is None or phases is None:
        yield from filter(None, (problem, other_problem))
        return
    yield from _unknown(facts, WEIGHTS, weights, names)
    for _, later in phases:
        yield from _unknown(facts, PHASES, later, names)
    if weights and not any(weights.values()):
        yield f"{facts.cite(WEIGHTS)}: the run would begin without a source. Give one of them a weight above 0."
        return
    yield from _too_small(facts, WEIGHTS, weights)
    for _, later in phases:
        yield from _too_small(facts, PHASES, later)
    if weights:
        read = {name for held in (weights, *(later for _, later in phases)) for name, value in held.items() if value}
        for name in names:
            if name not in read:
                yield (
                    f"{facts.cite(SOURCES, WEIGHTS)}: {name} never has a weight above 0, so it would not be read. Give "
                    f"it one in {WEIGHTS} or in an entry of {PHASES}, or leave it out."
                )


def temperature(facts: Facts) -> Iterator[str]:
    """Shares come from weights or from sizes."""
    if facts.is_set(TEMPERATURE) and facts.config.data.weights:
        yield (
            f"{facts.cite(TEMPERATURE, WEIGHTS)}: shares by weight leave the temperature nothing to do. Leave one of "
            "them out."
        )


def replay(facts: Facts) -> Iterator[str]:
    """A share of replayed samples needs a run to replay."""
    if facts.is_set(SHARE) and facts.config.data.replay_run is None:
        yield f"{facts.cite(SHARE, RUN)}: there is no run to replay. Set {RUN}=runs/NAME, or leave {SHARE} out."


def loss_aware(facts: Facts) -> Iterator[str]:
    """Shares that follow held-out losses need sources to choose between, and validations during the run."""
    if not facts.config.data.loss_aware_strength:
        return
    if len(facts.config.data.sources) < 2:
        yield (
            f"{facts.cite(STRENGTH, SOURCES)}: there is nothing to choose between. Give at least two sources, or set "
            f"{STRENGTH}=0."
        )
    iters, interval = "train.eval_iters", "train.eval_interval"
    if not facts.config.train.eval_iters or facts.config.train.eval_interval is None:
        yield (
            f"{facts.cite(STRENGTH, iters, interval)}: shares follow the held-out losses of validations during the "
            f"run. Set {iters} to at least 1 and {interval} to a number of steps, or {STRENGTH}=0."
        )


def length_schedule(facts: Facts) -> Iterator[str]:
    """Windows divide the sample, and attention can end where they do."""
    lengths, problem = _read(facts, LENGTHS, mixture_text.lengths)
    if lengths is None:
        yield problem
        return
    seq_length = facts.config.model.seq_length
    for _, tokens in lengths:
        if seq_length % tokens:
            yield (
                f"{facts.cite(LENGTHS, 'model.seq_length')}: {tokens} tokens do not divide a sample. "
                f"{nearest_divisors('window', seq_length, tokens)}"
            )
    if lengths and not facts.config.data.reset_attention_mask:
        yield (
            f"{facts.cite(LENGTHS, 'data.reset_attention_mask')}: a window ends where attention is cut, as between "
            "documents. Set data.reset_attention_mask=true, or leave the schedule out."
        )


def _read(facts: Facts, key: str, parse: Callable[[Sequence[str]], Any]) -> tuple[Any, str]:
    """What the list under ``key`` says, or None and the sentence about what is wrong with it."""
    try:
        return parse(facts.value(key)), ""
    except ConfigError as error:
        return None, f"{facts.cite(key)}: {error}."


def _unknown(facts: Facts, key: str, weights: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    for name in weights:
        if name == mixture_text.REPLAY and facts.config.data.replay_run is not None:
            yield f"{facts.cite(key)}: the share of {name} is {SHARE}, the same all through the run. Leave it out here."
        elif name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            nearest = f"Did you mean {close[0]}?" if close else f"The sources are {', '.join(names)}."
            yield f"{facts.cite(key, SOURCES)}: there is no source {name}. {nearest}"


def _too_small(facts: Facts, key: str, weights: dict[str, Fraction]) -> Iterator[str]:
    """Weights so small that only a larger share could be kept."""
    data = facts.config.data
    # A share that is a multiple of one in so many parts or fewer cannot be below one.
    least = Fraction(1, mixture_text.FINEST_PARTS)
    least /= 1 - (Fraction(repr(data.replay_share)) if data.replay_run is not None else 0)
    total = sum(weights.values())
    for name, weight in weights.items():
        if 0 < weight < least * total:
            needed = (total - weight) * least / (1 - least)
            yield (
                f"{facts.cite(key)}: the share of {name} is below the smallest possible one, "
                f"1/{mixture_text.FINEST_PARTS:,}. Give it a weight of at least {_rounded_up(needed)}, or of 0."
            )


def _rounded_up(number: Fraction) -> str:
    """A decimal of three digits that is at least ``number``, however large or small that is."""
    with decimal.localcontext(prec=3, rounding=decimal.ROUND_CEILING):
        return f"{decimal.Decimal(number.numerator) / decimal.Decimal(number.denominator):e}"


RULES = (one_or_many, sources, shares, temperature, replay, loss_aware, length_schedule)
