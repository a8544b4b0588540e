"""What an answer is worth: parts by name, each with its weight, and their sum. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.registry import OF_THE_ROW, REWARD_MODEL, verifier_named
from megatron_slm.rollout.config import RolloutConfig


class Part(NamedTuple):
    """One number about an answer.

    Attributes:
        name: under which it is logged.
        verifier: what gives it.
        weight: in the sum; None where it is watched, and not learned from.
    """

    name: str
    verifier: str
    weight: float | None


def parts_of(config: RolloutConfig) -> tuple[Part, ...]:
    """The parts of the reward and what is watched beside it, in the order in which they are named.

    Raises:
        ConfigError: nothing is rewarded, a weight is no number, a name is not known or comes twice, or a reward model
            is named but not given.
    """
    given = [_part(text, "rollout.rewards") for text in config.rewards]
    given += [Part(_short(name), name, None) for name in config.watched]
    if config.reward_model is not None and all(one.verifier != REWARD_MODEL for one in given):
        given.append(Part(REWARD_MODEL, REWARD_MODEL, 1.0))
    if all(one.weight is None for one in given):
        raise ConfigError(
            "rollout.rewards is empty: nothing says what an answer is worth. Give NAME=WEIGHT of a verifier, or a "
            "rollout.reward_model."
        )
    if config.reward_model is None and any(one.verifier == REWARD_MODEL for one in given):
        key = "watched" if REWARD_MODEL in config.watched else "rewards"
        raise ConfigError(f"rollout.{key} names {REWARD_MODEL!r}; give rollout.reward_model=RUN too.")
    for place, one in enumerate(given):
        if one.name in {other.name for other in given[:place]}:
            raise ConfigError(f"rollout.rewards and rollout.watched name {one.name!r} twice; each part has one weight.")
        if one.verifier not in (OF_THE_ROW, REWARD_MODEL) and ":" not in one.verifier:
            try:
                verifier_named(one.verifier)
            except ConfigError as error:
                raise ConfigError(f"rollout.{'rewards' if one.weight is not None else 'watched'}: {error}") from error
    return tuple(given)


def _part(text: str, key: str) -> Part:
    name, equals, number = text.rpartition("=")
    if not equals:
        name, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise ConfigError(f"{key} holds {text!r}; write NAME=WEIGHT with a finite number, as exact_match=1.0.")
    if weight == 0.0:
        raise ConfigError(f"{key} holds {text!r}, which is no part of the sum; name it in rollout.watched={name}.")
    return Part(_short(name), name, weight)


def _short(name: str) -> str:
    """A function of a file goes by its own name."""
    return name.rpartition(":")[2]


def total(values: Mapping[str, float], parts: Sequence[Part]) -> float:
    """The weighted sum; NaN where a part that is learned from is."""
    return math.fsum(part.weight * values[part.name] for part in parts if part.weight is not None)
