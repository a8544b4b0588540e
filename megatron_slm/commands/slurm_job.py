"""The run that a Slurm job trains: its configuration, one of a sweep's where the job is an array, and its budget."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.errors import ConfigError
from megatron_slm.survival.attempts import read_attempts

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved

SWEEP_VARIABLE, BUDGET_VARIABLE = "MSLM_SWEEP", "MSLM_BUDGET_NODE_HOURS"


@dataclass(frozen=True)
class Job:
    """One run: the configuration's file, what is given beside it, and both together."""

    path: Path
    values: Mapping[str, str]
    resolved: Resolved

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self.resolved.config.name)

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.resolved.config.log.runs_dir) / self.name

    def folder(self, job: str, restarts: int) -> Path:
        """Where one start of the job keeps its files."""
        return self.directory / "slurm" / f"{job}.{restarts}"

    def tokens(self, **others: str) -> list[str]:
        """The run as it is typed after ``mslm train``; ``others`` are further values, with ``__`` for a dot."""
        values = {**self.values, **{key.replace("__", "."): value for key, value in others.items()}}
        return [str(self.path), *(f"{key}={value}" for key, value in values.items())]


def split(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before CONFIG, and the rest.

    Raises:
        ConfigError: there is no CONFIG.
    """
    for position, token in enumerate(tokens):
        if token.endswith((".yaml", ".yml")) and not token.startswith("-") and "=" not in token:
            return list(tokens[:position]), list(tokens[position:])
    raise ConfigError("No CONFIG was given: name a file *.yaml, after the options of sbatch and before key=value.")


def make(directory: Path) -> None:
    """Make a directory that a run needs, with those above it.

    Raises:
        ConfigError: that is not possible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made ({error.strerror}): choose another log.runs_dir.") from None


def jobs_of(tokens: Sequence[str], indices: Sequence[int] | None) -> list[Job]:
    """The run of a job; those of all ``indices`` where it is an array.

    Raises:
        ConfigError: see ``job_of``; or there is a sweep and no array.
    """
    sweep = os.environ.get(SWEEP_VARIABLE)
    if indices is None:
        if sweep:
            raise ConfigError(f"{SWEEP_VARIABLE}={sweep} is for an array: give --array=0-{len(_lines(sweep)) - 1}.")
        return [job_of(tokens, None)]
    return [job_of(tokens, index) for index in indices]


def job_of(tokens: Sequence[str], index: int | None) -> Job:
    """The run of a job; of a job in an array it is another for every index.

    Args:
        tokens: CONFIG and what is typed after it.
        index: of the array; adds ``-index`` to the name, and either the line ``index`` (from 0) of the file that
            MSLM_SWEEP names, or ``index`` to the seed.

    Raises:
        ConfigError: a value is refused, or the sweep has no such line.
    """
    from megatron_slm.config.load import load

    _, rest = split(tokens)
    if "--fresh" in rest:
        raise ConfigError(
            "--fresh would begin anew after every requeue: move the run's directory aside, or give another name."
        )
    path, values = _read(rest)
    if index is not None:
        base = load(path, _typed(values)).config
        sweep = os.environ.get(SWEEP_VARIABLE)
        own = _swept(sweep, index) if sweep else {"train.seed": str(base.train.seed + index)}
        values |= {**own, "name": f"{base.name}-{index}"}
        try:
            return Job(path, values, load(path, _typed(values)))
        except ConfigError as error:
            raise ConfigError(f"{_place(sweep, index)}: {error}" if sweep else str(error)) from None
    return Job(path, values, load(path, _typed(values)))


def array_indices(options: Sequence[str]) -> list[int] | None:
    """Indices that ``--array`` of ``sbatch`` asks for, such as ``0-4``, ``1,3``, ``0-8:2%2``; None without that option.

    Raises:
        ConfigError: it is none of these.
    """
    text = None
    for option, following in zip(options, [*options[1:], ""], strict=True):
        if option in ("-a", "--array"):
            text = following
        elif option.startswith("--array="):
            text = option.partition("=")[2]
        elif option.startswith("-a") and not option.startswith("--"):
            text = option[2:]
    if text is None:
        return None
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        matched = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if matched is None:
            raise ConfigError(f"--array={text} is no list of indices such as 0-4 or 1,3.")
        first, last, step = int(matched[1]), int(matched[2] or matched[1]), int(matched[3] or 1)
        found += range(first, last + 1, max(1, step))
    return found


def budget_left(run: Path, nodes: int, environ: Mapping[str, str]) -> float | None:
    """Node-hours that a run may still use; None where it has no budget.

    Raises:
        ConfigError: the budget is no number.
    """
    text = environ.get(BUDGET_VARIABLE)
    if not text:
        return None
    try:
        return float(text) - node_hours(run, nodes)
    except ValueError:
        raise ConfigError(f"{BUDGET_VARIABLE}={text} is no number of hours.") from None


def node_hours(run: Path, nodes: int) -> float:
    """What the run has used over all its starts, as if each had had so many nodes."""
    return nodes * sum(one.last_seen - one.started for one in read_attempts(run)) / 3600


def _read(tokens: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """CONFIG and the values beside it, by key."""
    from megatron_slm.config import flags

    typed = flags.read(tokens)
    if typed.problems or len(typed.positionals) != 1:
        extra = f"Only one CONFIG is read, but there are {', '.join(typed.positionals)}."
        raise ConfigError("\n".join(typed.problems) or extra)
    values = {given.key: given.text for given in typed.given}
    return Path(typed.positionals[0]), {key: _joined(text) for key, text in values.items()}


def _joined(text: str | tuple[str, ...]) -> str:
    return text if isinstance(text, str) else ",".join(text)


def _typed(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _lines(sweep: str) -> list[str]:
    try:
        lines = Path(sweep).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{SWEEP_VARIABLE}={sweep} cannot be read: {error.strerror}.") from None
    found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise ConfigError(f"{SWEEP_VARIABLE}={sweep} has no line of values.")
    return found


def _place(sweep: str, index: int) -> str:
    return f"{sweep}, line {index} (from 0; comments and empty lines do not count)"


def _swept(sweep: str, index: int) -> dict[str, str]:
    """The values of one line of a sweep."""
    lines = _lines(sweep)
    if index >= len(lines):
        raise ConfigError(f"{sweep} has {len(lines)} lines, but the array asks for line {index} (from 0).")
    try:
        words = shlex.split(lines[index])
    except ValueError as error:
        raise ConfigError(f"{_place(sweep, index)}: {lines[index]!r} cannot be read: {error}.") from None
    try:
        return _read(["CONFIG", *words])[1]
    except ConfigError as error:
        raise ConfigError(f"{_place(sweep, index)}: {error}") from None
