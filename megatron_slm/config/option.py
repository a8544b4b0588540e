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
    above: float | None = None,
    below: float | None = None,
    flag: str | None = None,
) -> Any:
    """Declare a field of a section.

    Args:
        default: the value without any configuration; immutable.
        help: one sentence, with the unit, for ``docs/config.md`` and the error messages.
        choices: the only strings accepted.
        minimum, maximum: inclusive bounds of a number.
        above, below: exclusive bounds of a number; each side has one bound of either kind.
        flag: Megatron's spelling where it is not the kebab-case of the field name; a leading ``no-`` or
            ``disable-`` marks a flag that sets the field to false.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "flag": flag, **bounds}
    return dataclasses.field(default=default, metadata=metadata)
