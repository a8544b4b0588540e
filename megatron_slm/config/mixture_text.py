"""What the lists of the data section say: ``NAME=VALUE``, ``SAMPLE: NAME=NUMBER ...`` and ``SAMPLE: TOKENS``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from megatron_slm.errors import ConfigError

REPLAY = "replay"
"""The source that ``data.replay_run`` makes."""

FINEST_PARTS = 1 << 20
"""Shares are exact as multiples of one in up to so many parts, else rounded to so many: none can be smaller."""

_Value = TypeVar("_Value")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# A mapping in YAML arrives with an equals sign in place of its colon.
_ENTRY = re.compile(r"\s*([0-9]{1,18})\s*[:=]\s*(.*)", re.DOTALL)


def sources(items: Sequence[str]) -> dict[str, str]:
    """``data.sources``: name -> directory of a prepared corpus.

    Raises:
        ConfigError: an item is no NAME=DIR, or a name comes twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, path = (part.strip() for part in item.partition("="))
        if not equals or not _NAME.fullmatch(name) or not path:
            raise ConfigError(
                f"'{item}' is not NAME=DIR, where a name is letters, digits, dots, dashes and underscores, beginning "
                "with a letter"
            )
        _add(found, name, path)
    return found


def weights(items: Sequence[str]) -> dict[str, Fraction]:
    """``data.weights``: name -> weight, exactly the decimal that was typed.

    Raises:
        ConfigError: an item is no NAME=NUMBER, a number is negative, or a name comes twice.
    """
    found: dict[str, Fraction] = {}
    for item in items:
        name, equals, number = (part.strip() for part in item.partition("="))
        if not equals or not _NAME.fullmatch(name) or not _NUMBER.fullmatch(number):
            raise ConfigError(f"'{item}' is not NAME=NUMBER with a number of at least 0, as in kjv=0.7")
        _add(found, name, Fraction(number))
    return found


def phases(items: Sequence[str]) -> list[tuple[int, dict[str, Fraction]]]:
    """``data.phases``: (first sample, weights) of each, in ascending order.

    Raises:
        ConfigError: an entry is no 'SAMPLE: NAME=NUMBER ...', has no weight above 0, or does not come after the one
            before it.
    """
    found = [(start, _phase_weights(item, text)) for item, (start, text) in _entries(items)]
    if found and found[0][0] == 0:
        raise ConfigError(f"'{items[0]}' begins at sample 0, where data.weights holds: write its weights there")
    return found


def lengths(items: Sequence[str]) -> list[tuple[int, int]]:
    """``data.length_schedule``: (first sample, tokens of a window) of each, in ascending order.

    Raises:
        ConfigError: an entry is no 'SAMPLE: TOKENS', or does not come after the one before it.
    """
    found = []
    for item, (start, text) in _entries(items):
        if not re.fullmatch(r"[1-9][0-9]{0,11}", text.strip()):
            raise ConfigError(f"'{item}' is not 'SAMPLE: TOKENS' with at least one token, as in '20000: 1024'")
        found.append((start, int(text)))
    return found


def _phase_weights(item: str, text: str) -> dict[str, Fraction]:
    found = weights(re.sub(r"\s*=\s*", "=", text).replace(",", " ").split())
    if not any(found.values()):
        raise ConfigError(f"'{item}' gives no source a weight above 0")
    return found


def _entries(items: Sequence[str]) -> list[tuple[str, tuple[int, str]]]:
    """Each item with its sample and what follows; samples ascend."""
    found: list[tuple[str, tuple[int, str]]] = []
    for item in items:
        entry = _ENTRY.fullmatch(item)
        if entry is None:
            raise ConfigError(f"'{item}' does not begin with a sample of the run and a colon, as in '20000: ...'")
        start = int(entry[1])
        if found and start <= found[-1][1][0]:
            raise ConfigError(f"'{item}' must begin after sample {found[-1][1][0]} of the entry before it")
        found.append((item, (start, entry[2])))
    return found


def _add(found: dict[str, _Value], name: str, value: _Value) -> None:
    if name in found:
        raise ConfigError(f"'{name}' is named twice")
    found[name] = value
