"""Defaults < preset < YAML file < command line -> one frozen configuration that knows where each value came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config import flags, source_file
from megatron_slm.config.keys import all_keys, sections
from megatron_slm.config.presets import PRESETS
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import Given, parse, show
from megatron_slm.errors import ConfigError

SEQUENCE_PARALLEL = "parallel.sequence_parallel"


@dataclass(frozen=True)
class Resolved:
    """A configuration and the source of every value in it."""

    config: RunConfig
    provenance: Mapping[str, str]
    """``model.hidden_size`` -> ``default``, ``preset tiny``, ``file x.yaml:12`` or ``command line``."""

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        return value_of(self.config, key)

    def to_yaml(self) -> str:
        """The whole configuration as YAML; :func:`load` reads it back to an equal one."""
        lines = [f"{key}: {show(self.value(key))}" for key in all_keys() if "." not in key]
        for section in sections():
            lines += ["", f"{section}:"]
            for key in all_keys():
                if key.startswith(f"{section}."):
                    lines.append(f"  {key.partition('.')[2]}: {show(self.value(key))}")
        return "\n".join(lines) + "\n"

    def provenance_record(self) -> dict[str, dict[str, Any]]:
        """What ``provenance.json`` holds: dotted key -> its value and source."""
        return {key: {"value": self.value(key), "source": self.provenance[key]} for key in all_keys()}


def load(path: Path | None, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a configuration.

    Args:
        path: a YAML file, or ``None``.
        overrides: tokens of the command line: ``a.b=c`` and Megatron's flags.

    Raises:
        ConfigError: a key is unknown, given twice, or holds a value of the wrong type; the message lists every case.
    """
    resolved, problems = examine(path, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    return resolved


def examine(path: Path | None, overrides: Sequence[str] = ()) -> tuple[Resolved, list[str]]:
    """Resolve what can be read, and say what cannot.

    Args:
        path, overrides: as for :func:`load`.

    Returns:
        The configuration, in which a refused value leaves its key at the value below it in precedence (of a key given
        twice, the later value counts); and one sentence for each problem.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it is no YAML mapping.
    """
    given, problems = source_file.read(path) if path is not None else ([], [])
    typed = flags.read(overrides)
    problems += typed.problems
    problems += [f"{token} (command line) is neither key=value nor a flag." for token in typed.positionals]
    values, provenance = _merge([*given, *typed.given], problems)
    if values["name"] is None:
        values["name"] = (path.stem if path is not None else None) or values["preset"] or values["stage"]
        provenance["name"] = "default"
    if provenance[SEQUENCE_PARALLEL] == "default" and _experts_over_tp(values):
        values[SEQUENCE_PARALLEL], provenance[SEQUENCE_PARALLEL] = True, "default with experts over tp"
    return Resolved(_build(values), provenance), problems


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key, ``model.num_layers``."""
    section, dot, field = key.partition(".")
    return getattr(getattr(config, section), field) if dot else getattr(config, section)


def _experts_over_tp(values: Mapping[str, Any]) -> bool:
    """Whether core would train the model with sequence parallelism alone (``rules_experts``)."""
    return values["model.num_moe_experts"] is not None and values["parallel.tensor_model_parallel_size"] > 1


def _merge(given: Sequence[Given], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay the given values over the preset over the defaults; wrong values are added to ``problems``."""
    values = {key.name: key.default for key in all_keys().values()}
    provenance = dict.fromkeys(all_keys(), "default")
    parsed: dict[str, tuple[Any, str]] = {}
    for entry in given:
        try:
            parsed[entry.key] = (_value(entry), entry.source)
        except ConfigError as error:
            problems.append(str(error))
    preset, _ = parsed.get("preset", (None, ""))
    if preset is not None:
        values.update(PRESETS[preset].values)
        provenance.update(dict.fromkeys(PRESETS[preset].values, f"preset {preset}"))
    for name, (value, origin) in parsed.items():
        values[name], provenance[name] = value, origin
    return values, provenance


def _value(entry: Given) -> Any:
    """The value of one entry.

    Raises:
        ConfigError: it is none that the key can hold.
    """
    value = parse(all_keys()[entry.key], entry)
    if entry.key == "preset" and value is not None and value not in PRESETS:
        raise ConfigError(
            f"preset = {value} ({entry.source}): there is no such preset; the presets are {', '.join(PRESETS)}."
        )
    return value


def _build(values: Mapping[str, Any]) -> RunConfig:
    """The dataclasses that hold ``values``."""
    config = RunConfig(**{key: value for key, value in values.items() if "." not in key})
    for section in sections():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
        config = dataclasses.replace(config, **{section: type(getattr(config, section))(**own)})
    return config
