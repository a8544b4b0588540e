"""Text -> value of a key, strictly, and back. Files and the command line are read by the same rules."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_slm.config.keys import Key
from megatron_slm.errors import ConfigError

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_NULL = ("", "~", "null", "none")


@dataclass(frozen=True)
class Given:
    """A value as somebody wrote it."""

    key: str
    text: str | tuple[str, ...]
    """A tuple where a list was written."""
    source: str
    """``file x.yaml:12`` or ``command line``."""
    quoted: bool = False
    """In quotes in the file: text, whatever it looks like."""
    written: str = ""
    """How it was typed, for the message about a key given twice."""


def parse(key: Key, given: Given) -> Any:
    """The value of ``given`` in the type of ``key``.

    Raises:
        ConfigError: it is of another type, out of bounds, or none of the choices.
    """
    if key.optional and isinstance(given.text, str) and not given.quoted and given.text.lower() in _NULL:
        return None
    value = _parse_kind(key, given)
    if value is None or (key.choices and value not in key.choices) or _out_of_bounds(key, value):
        shown = f'"{given.text}"' if given.quoted or key.kind is str else show(given.text).strip('"')
        raise ConfigError(f"{key.name} = {shown} ({given.source}): expected {key.expects}.")
    return value


def show(value: Any) -> str:
    """``value`` as it is written in a configuration file; :func:`parse` reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in (*_NULL, *_TRUE, *_FALSE, "y", "n")
        return value if plain else json.dumps(value, ensure_ascii=False)
    return repr(value)


def _parse_kind(key: Key, given: Given) -> Any:
    """The value in the key's type, ``None`` where the text is not of that type."""
    text = given.text
    if key.kind is tuple:
        return text if isinstance(text, tuple) else tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(text, tuple):
        return None
    if key.kind is str:
        return text or None
    if given.quoted:
        return None
    if key.kind is bool:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else None
    if key.kind is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text) else None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _out_of_bounds(key: Key, value: Any) -> bool:
    """Whether a number leaves the key's bounds."""
    return (
        (key.minimum is not None and value < key.minimum)
        or (key.maximum is not None and value > key.maximum)
        or (key.above is not None and value <= key.above)
        or (key.below is not None and value >= key.below)
    )
