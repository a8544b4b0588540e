"""What a run has written about itself, read without torch and without changing anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.train import publish
from megatron_slm.train.run_directory import RunDirectory, stored_identity
from megatron_slm.train.saved_state import SCHEMA_VERSION, STATE_FILE, SavedState, read_state

POLICY_STAGES = ("ppo", "grpo")
"""Their loss says nothing of how well they do; their reward does."""

FEWEST_STEPS = 20
"""Steps below which no trend is judged: a quarter of them is five, the smallest sample whose median two outliers do
not move."""


class Series(NamedTuple):
    """Finite numbers by step."""

    steps: list[int]
    values: list[float]

    def quarter(self, number: int) -> list[float]:
        """Values of a quarter of the steps, 0 to 3."""
        size = len(self.values)
        return self.values[number * size // 4 : (number + 1) * size // 4]

    def tail(self, count: int) -> Series:
        """The last ``count``."""
        return Series(self.steps[-count:], self.values[-count:])

    def negative(self) -> Series:
        """The same with the sign turned: what is to rise becomes what is to fall."""
        return Series(self.steps, [-value for value in self.values])


class Event(NamedTuple):
    """A line of ``progress.txt``: what happened, and its second part."""

    what: str
    detail: str


@dataclass(frozen=True)
class Records:
    """Everything that the rules read.

    Attributes:
        path: of the run.
        config: ``config.yaml`` as it stands.
        steps, validations, dynamics: objects of ``metrics.jsonl``, ``validation.jsonl``, ``dynamics.jsonl``.
        events: of ``progress.txt``.
        errors: what ended the run, from ``log.txt``.
        checkpoints: ``state.json`` by step, or why it cannot be read.
        identity: digest of what makes two runs the same; None where it is not known.
        against: another run to compare with.
    """

    path: Path
    config: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]] = ()
    dynamics: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Event] = ()
    errors: Sequence[str] = ()
    checkpoints: Mapping[int, SavedState | str] = field(default_factory=dict)
    identity: str | None = None
    against: Records | None = None

    @property
    def stage(self) -> str:
        """Of training."""
        return str(self.config.get("stage") or "pretrain")

    @property
    def loss_key(self) -> str:
        """What the loss is called in a record."""
        return "lm_loss" if any("lm_loss" in record for record in self.steps[:1]) else "loss"

    @cached_property
    def applied(self) -> list[Mapping[str, Any]]:
        """Records of the steps whose update was made."""
        return [record for record in self.steps if not record.get("skipped")]

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def series(self, name: str) -> Series:
        """A number of the applied steps; steps without it are left out."""
        return series_of(self.applied, name)

    def held_out(self, name: str) -> Series:
        """A number of the validations."""
        return series_of(self.validations, name)

    def objective(self) -> Series:
        """What is to fall: the loss, or for a policy minus its reward."""
        if self.stage in POLICY_STAGES:
            return self.series("reward").negative()
        return self.series(self.loss_key)

    @property
    def objective_name(self) -> str:
        """The objective in words."""
        return "minus the reward" if self.stage in POLICY_STAGES else "the loss"

    def lacks(self, *names: str, steps: int = FEWEST_STEPS) -> str:
        """Which of the named numbers are not recorded often enough, as a clause; empty where all are."""
        short = [name for name in names if len(self.series(name).values) < steps]
        return f"needs {steps} steps with {' and '.join(short)}" if short else ""


def series_of(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """A number of records by their steps, where it is there and finite."""
    pairs = [(record["step"], record.get(name)) for record in records]
    found = [(step, float(value)) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]
    return Series([step for step, _ in found], [value for _, value in found])


def read(path: Path, *, against: Path | None = None) -> Records:
    """The records of a run.

    Args:
        against: another run.

    Raises:
        DataError: there is no run, it has no steps, or one of its files is damaged (the message names the line).
    """
    run = RunDirectory(path)
    if not run.metrics.is_file():
        raise DataError(
            f"{path} holds no {run.metrics.name}, so it is no run that has made a step; give a directory that "
            "mslm train has written, as in mslm diagnose runs/NAME."
        )
    steps = _objects(run.metrics)
    if not steps:
        raise DataError(f"{run.metrics} is empty: the run has made no step yet, so there is nothing to diagnose.")
    return Records(
        path,
        _config(path / "config.yaml"),
        steps,
        _objects(run.validation),
        _objects(run.dynamics),
        tuple(_events(run.progress)),
        tuple(line.removeprefix("error: ") for line in _lines(run.log) if line.startswith("error: ")),
        _checkpoints(run.checkpoints),
        stored_identity(path),
        read(against) if against is not None else None,
    )


def _objects(path: Path) -> list[dict[str, Any]]:
    """One object a line. The last line may be torn: the run is writing it, or was killed.

    Raises:
        DataError: another line is no record.
    """
    lines, found = _lines(path), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is no number")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}:{number} is no record of a step ({error}); take the line out, or give a run that is whole."
            ) from error
        found.append(record)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable.") from error


def _config(path: Path) -> dict[str, Any]:
    """The configuration, without its rules: a run of an older program is diagnosed too."""
    try:
        found = yaml.safe_load("\n".join(_lines(path)))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML ({error}); restore it from a checkpoint of the run.") from error
    return found if isinstance(found, dict) else {}


def _events(path: Path) -> Iterator[Event]:
    for line in _lines(path):
        parts = line.split("\t")
        if len(parts) > 3:
            yield Event(parts[3], parts[4] if len(parts) > 4 else "")


def _checkpoints(directory: Path) -> dict[int, SavedState | str]:
    found: dict[int, SavedState | str] = {}
    if not directory.is_dir():
        return found
    for step, path in publish.published(directory).items():
        try:
            found[step] = read_state(path)
        except CheckpointError as error:
            if not _of_another_program(path / STATE_FILE):
                found[step] = str(error)
    return found


def _of_another_program(path: Path) -> bool:
    """Whether a whole file is of another schema: nothing is wrong with it, it cannot be read here."""
    try:
        return bool(json.loads("\n".join(_lines(path)))["schema_version"] != SCHEMA_VERSION)
    except (ValueError, KeyError, TypeError):
        return False
