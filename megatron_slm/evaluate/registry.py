"""Which function a verifier's name means: one of ours, one of a user's file, or the one that a row asks for."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.verifiers import Fields, Unverifiable, Verifier, verifiers

OF_THE_ROW = "verifier"
"""The name of whatever the prompt's own field ``verifier`` names."""
REWARD_MODEL = "model"
"""The name of the reward model's number, which no function gives."""


def verifier_named(name: str) -> Verifier:
    """The function ``name``, or ``path/to/file.py:function``, whose file is run.

    Raises:
        ConfigError: there is none.
    """
    known = verifiers()
    if name in known:
        return known[name]
    path, _, function = name.rpartition(":")
    if not path:
        names = [*known, OF_THE_ROW, REWARD_MODEL]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(names)}."
        raise ConfigError(f"{name!r} is no verifier: {hint} A function of your own is path/to/file.py:function.")
    return _function_of(Path(path), function)


def _function_of(path: Path, function: str) -> Verifier:
    if not path.is_file():
        raise ConfigError(f"The verifier {path}:{function} has no file {path.absolute()}. Check the path.")
    found: Any = None
    try:
        spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
        assert spec is not None and spec.loader is not None, f"{path} is a Python source file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found = getattr(module, function, None)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"The verifier's file {path} fails: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ConfigError(f"{path} has no function {function!r}; a verifier is (answer: str, fields: dict) -> float.")
    verifier: Verifier = found
    return verifier


def verifier_of_row(fields: Fields) -> Verifier:
    """What the field ``verifier`` asks for: a name, or an object with ``name`` whose other entries are fields too.

    Raises:
        Unverifiable: there is none. Data may not name files: functions of a user's file are named in the configuration.
    """
    asked = fields.get(OF_THE_ROW)
    options = asked if isinstance(asked, dict) else {"name": asked}
    name = options.get("name")
    known = verifiers()
    if not isinstance(name, str) or name not in known:
        raise Unverifiable(f'the row has "verifier": {asked!r:.80}; it must name one of {", ".join(known)}')
    more = {key: value for key, value in options.items() if key != "name"}
    return partial(_with_options, known[name], more)


def _with_options(verifier: Verifier, options: dict[str, Any], answer: str, fields: Fields) -> float:
    return verifier(answer, {**fields, **options})
