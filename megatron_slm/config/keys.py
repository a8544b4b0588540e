"""Every key of the configuration, read off the dataclasses: its section, type, bounds and flags."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slm.config.run_config import RunConfig


@dataclass(frozen=True)
class Key:
    """One configurable value."""

    name: str
    """Dotted path, ``model.num_layers``; the three keys at the top have no dot."""
    kind: type
    """``int``, ``float``, ``bool``, ``str`` or ``tuple`` (of text)."""
    optional: bool
    """Whether ``null`` is a value."""
    default: Any
    help: str
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    flag: str | None
    """Megatron's spelling where it is not the field's own name in kebab-case."""

    @property
    def field(self) -> str:
        """The last part of the name; unique over all sections."""
        return self.name.rpartition(".")[2]

    @property
    def own_flag(self) -> str:
        """The field's name as a command-line flag, with its dashes."""
        return "--" + self.field.replace("_", "-")

    @property
    def flags(self) -> dict[str, str | None]:
        """Flag -> the text it stands for, ``None`` where the flag takes a value."""
        if self.kind is not bool:
            return {flag: None for flag in (self.own_flag, f"--{self.flag}") if flag != "--None"}
        spelled = {self.own_flag: "true", f"--no-{self.own_flag[2:]}": "false"}
        if self.flag is not None:
            spelled[f"--{self.flag}"] = "false" if self.flag.startswith(("no-", "disable-")) else "true"
        return dict(spelled)

    @property
    def expects(self) -> str:
        """What the key may hold, for an error message."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = _KIND_WORDS[self.kind]
        if self.minimum is not None and self.maximum is not None:
            words += f" from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            words += f" of at least {self.minimum:g}"
        if self.above is not None:
            words += f" above {self.above:g}"
        if self.below is not None:
            words += (
                f" and below {self.below:g}" if (self.minimum, self.above) != (None, None) else f" below {self.below:g}"
            )
        return words + (", or null" if self.optional else "")


_KIND_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list of names",
}


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Dotted name -> key, in the order of the dataclasses."""
    return types.MappingProxyType({key.name: key for key in _keys_of(RunConfig, "")})


@functools.cache
def sections() -> tuple[str, ...]:
    """Names of the sections, in order."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in all_keys() if "." in name))


@functools.cache
def flag_table() -> Mapping[str, tuple[Key, str | None]]:
    """Flag -> its key and the text it stands for (``None``: the next argument is the value)."""
    table = {flag: (key, text) for key in all_keys().values() for flag, text in key.flags.items()}
    return types.MappingProxyType(table)


def unknown_key(name: str, source: str) -> str:
    """An error about a key that does not exist, with the nearest one that does."""
    same_field = [key for key in all_keys().values() if key.field == name.rpartition(".")[2]]
    nearest = same_field[0].name if same_field else _closest(name, all_keys()) or _closest_field(name)
    way_out = f"did you mean {nearest}?" if nearest else "see docs/config.md."
    return f"{name} ({source}) is no key of the configuration; {way_out}"


def unknown_flag(flag: str, source: str) -> str:
    """An error about a flag that does not exist, with the nearest one that does."""
    nearest = _closest(flag.replace("_", "-"), flag_table())
    way_out = f"; did you mean {nearest}? Abbreviations are not accepted." if nearest else "; see docs/config.md."
    return f"{flag} ({source}) is no flag{way_out}"


def _closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, if any is."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)), None)


def _closest_field(name: str) -> str | None:
    """The key whose field is most like the last part of ``name``, whatever its section."""
    by_field = {key.field: key.name for key in all_keys().values()}
    nearest = _closest(name.rpartition(".")[2], by_field)
    return by_field[nearest] if nearest else None


def _keys_of(section: type, prefix: str) -> list[Key]:
    """The keys of one dataclass, sections inside it included."""
    hints = typing.get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += _keys_of(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        kind, optional = _kind_of(hint)
        name = prefix + field.name
        found.append(Key(name=name, kind=kind, optional=optional, default=field.default, **field.metadata))
    return found


def _kind_of(hint: Any) -> tuple[type, bool]:
    """``int | None`` -> ``(int, True)``; ``tuple[str, ...]`` -> ``(tuple, False)``."""
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        assert len(members) == 1, f"A key has one type, optional or not, but {hint} has several."
        return _kind_of(members[0])[0], True
    kind = typing.get_origin(hint) or hint
    assert kind in _KIND_WORDS, f"A key is one of {', '.join(known.__name__ for known in _KIND_WORDS)}, not {hint}."
    return kind, False
