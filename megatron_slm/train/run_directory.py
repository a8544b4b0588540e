"""``runs/NAME``: which run it belongs to, and what is written into it before the first step. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from megatron_slm.config.load import Resolved
from megatron_slm.errors import CheckpointError

IDENTITY = "identity.json"
BESIDE_RUN = ("slurm", "restarts.jsonl")
"""What a launcher may have written there before the run itself has begun."""
PACKAGES = ("megatron-slm", "megatron-core", "torch", "numpy", "pyarrow", "sentencepiece", "transformer-engine")


@dataclass(frozen=True)
class RunDirectory:
    """Names inside a run's directory."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where ``iter_NNNNNNN`` and the tracker lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One object a step (``train/metrics.py``)."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One object a validation."""
        return self.path / "validation.jsonl"

    @property
    def dynamics(self) -> Path:
        """One object a measurement of the training dynamics."""
        return self.path / "dynamics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Directory of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """Every line the run printed, over all its restarts."""
        return self.path / "log.txt"

    @property
    def progress(self) -> Path:
        """Starts, saves and ends, over all restarts."""
        return self.path / "progress.txt"


def prepare(
    resolved: Resolved,
    *,
    identity: Mapping[str, Any],
    fresh: bool,
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
) -> RunDirectory:
    """Make the directory of a run, or find it again. To be called by one rank, before any other writes there.

    A resume may change layout, batch sizes, optimizer, schedule and length; precision counts as part of the identity.
    What it replaces (``config.yaml``, ``provenance.json``, ``environment.json``, ``data.json``) is kept as
    ``config.yaml.1``, ... .

    Args:
        resolved: gives ``log.runs_dir`` and ``name``, ``config.yaml`` and ``provenance.json``.
        identity: nested fields that make two runs the same run: model, data with its digest, seed.
        fresh: move an existing run aside, to ``NAME.1``, ``NAME.2`` ..., and start anew.
        environment: facts only the caller knows (launcher, world size, device), added to ``environment.json``.
        data: sources, their provenance and licences, for ``data.json``.

    Raises:
        CheckpointError: the directory belongs to another run or to no run (the message lists the fields that differ),
            or cannot be written.
    """
    directory = RunDirectory(Path(resolved.config.log.runs_dir) / str(resolved.config.name))
    records = {
        "config.yaml": resolved.to_yaml(),
        "provenance.json": _to_json(resolved.provenance_record()),
        "environment.json": _to_json({**environment, **surroundings()}),
        "data.json": _to_json(data),
    }
    try:
        if fresh and directory.path.exists():
            os.rename(directory.path, _free_name(directory.path))
        fields = check(resolved, identity=identity)
        directory.path.mkdir(parents=True, exist_ok=True)
        # First, so that an interrupted start leaves either nothing or a directory that knows whose it is.
        _write(directory.path / IDENTITY, _to_json({"identity": digest(fields), "fields": fields}))
        _keep_previous(directory.path, records)
        for name, text in records.items():
            _write(directory.path / name, text)
    except OSError as error:
        raise CheckpointError(
            f"{directory.path} cannot be written ({error.strerror or error}); make room there or make it writable, or "
            "name another with log.runs_dir="
        ) from error
    return directory


def check(resolved: Resolved, *, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a directory that belongs to another run or to no run; changes nothing.

    Returns:
        The identity as it is stored, precision included.

    Raises:
        CheckpointError: lists the fields that differ.
    """
    fields = identity_fields(resolved, identity)
    _check_identity(Path(resolved.config.log.runs_dir) / str(resolved.config.name), fields)
    return fields


def identity_fields(resolved: Resolved, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as it is stored, precision included."""
    fields: dict[str, Any] = json.loads(
        json.dumps({**identity, "precision": asdict(resolved.config.precision)}, default=str)
    )
    return fields


def stored_identity(path: Path) -> str | None:
    """Digest of the identity of the run in ``path``; None where none is stored."""
    try:
        return digest(json.loads((path / IDENTITY).read_text(encoding="utf-8"))["fields"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(directory: RunDirectory) -> Iterator[None]:
    """Hold the run's name, so that two jobs never write one directory. The lock ends with the process at the latest.

    Raises:
        CheckpointError: another job holds it, or nothing can be written where runs lie.
    """
    path = directory.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the directory, which --fresh renames.
        stream = (path.parent / f".{path.name}.lock").open("a")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be used for a run ({error}); name another with log.runs_dir= and name="
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{path} is in use by another job; wait for it, stop it, or choose another name="
            ) from error
        yield


def digest(identity: Mapping[str, Any]) -> str:
    """sha256 of the fields, whatever their order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def surroundings() -> dict[str, Any]:
    """Versions, machine and source revision of this process."""
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "git": _git(),
        "command": sys.argv,
    }


def _keep_previous(path: Path, records: Mapping[str, str]) -> None:
    """Copy what ``records`` is about to replace, all files under one number, unless nothing differs."""
    previous = [path / name for name in records if (path / name).exists()]
    if all(file.read_text(encoding="utf-8") == records[file.name] for file in previous):
        return
    number = 1
    while any(path.joinpath(f"{name}.{number}").exists() for name in records):
        number += 1
    for file in previous:
        shutil.copy2(file, path / f"{file.name}.{number}")


def _check_identity(path: Path, fields: dict[str, Any]) -> None:
    # A start that was interrupted before its first rename has left a partial file, and nothing of value.
    early = {_partial(path / IDENTITY).name, *BESIDE_RUN}
    if not path.exists() or (path.is_dir() and all(entry.name in early for entry in path.iterdir())):
        return
    remedy = "Choose another name=, or --fresh to move the old run aside and start anew."
    try:
        known = json.loads((path / IDENTITY).read_text(encoding="utf-8"))["fields"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} exists but holds no run ({IDENTITY} is missing). {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / IDENTITY} is damaged ({error!r}). {remedy}") from error
    old, new = _flat(known), _flat(fields)
    absent = object()
    differ = [key for key in sorted({*old, *new}) if old.get(key, absent) != new.get(key, absent)]
    if differ:
        lines = [f"  {key}: {_shown(old, key)} there, {_shown(new, key)} now" for key in differ]
        raise CheckpointError(
            "\n".join(
                [f"{path} is another run: a resume needs the same model, data, seed and precision.", *lines, remedy]
            )
        )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return json.dumps(fields[key]) if key in fields else "absent"


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model, by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the current directory, and whether tracked files differ from it; None outside a repository."""
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git_output("status", "--porcelain", "--untracked-files=no"))}


def _git_output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    """Replace a file in one rename: a reader never sees half of it."""
    _partial(path).write_text(text, encoding="utf-8")
    os.replace(_partial(path), path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
