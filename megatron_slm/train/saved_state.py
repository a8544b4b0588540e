"""``state.json``: the part of a checkpoint that is not tensors. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.errors import CheckpointError

STATE_FILE = "state.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a resume needs beside the payload, as JSON values."""

    step: int
    consumed_samples: int
    cursor: dict[str, Any]
    layout: dict[str, int]
    """The degrees under which random states have their owners."""
    params_dtype: str
    tokenizer_hash: str
    records: dict[str, Any] = field(default_factory=dict)
    """What guard and hooks remember, by name."""
    parts: list[str] = field(default_factory=list)
    """Names of the tensors stored beside model and optimizer."""
    averaged: list[str] = field(default_factory=list)
    """Where the weights are a mean: the checkpoints it is of. There is no optimizer state then."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of ``state.json``."""
        return json.dumps(asdict(self), indent=1)


def read_state(path: Path) -> SavedState:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, or of another schema version.
    """
    file = path / STATE_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields["schema_version"]
        if version == SCHEMA_VERSION:
            return SavedState(**fields)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: {file.name} is missing; name an iter_NNNNNNN directory"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); choose another checkpoint") from error
    raise CheckpointError(
        f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}; use the program version that wrote "
        "it, or start a new run (--fresh)"
    )
