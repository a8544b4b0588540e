"""One field of a configuration section: its default, its meaning, and what it may hold."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    flag: str | None = None,
) -> Any:
    """Declare a field of a section.

    Args:
        default: the value without any configuration; immutable.
        help: one sentence, with the unit, for ``docs/config.md`` and the error messages.
        choices: the only strings accepted.
        minimum, maximum: inclusive bounds of a number.
        flag: Megatron's spelling where it is not the kebab-case of the field name; a leading ``no-`` or
            ``disable-`` marks a flag that sets the field to false.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)
