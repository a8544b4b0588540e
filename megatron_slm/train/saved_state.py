"""``state.json``: the part of a checkpoint that is not tensors. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.layout import Layout
from megatron_slm.train.manifest import read_regular

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
    resharded_from: dict[str, int] = field(default_factory=dict)
    """Where the payload was cut anew for ``layout``: the degrees before. There are no random states then."""
    global_hash: str = ""
    """Of the tensors (``global_hash``), where it has been taken."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of ``state.json``."""
        return json.dumps(asdict(self), indent=1)


def layout_record(layout: Layout) -> dict[str, int]:
    """The degrees under which random states have their owners; those of the experts where they are not the others'."""
    experts = {"ep": layout.expert_model_parallel_size, "etp": layout.expert_tp_size}
    divided = layout.expert_model_parallel_size > 1 or layout.expert_tp_size != layout.tensor_model_parallel_size
    return {"world_size": layout.world_size, "vpp": layout.vpp_size, **layout.sizes, **(experts if divided else {})}


def read_state(path: Path) -> SavedState:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, has fields of a wrong kind, or is of another schema version.
    """
    file = path / STATE_FILE
    try:
        fields = json.loads(read_regular(file))
        version = fields["schema_version"]
        if version == SCHEMA_VERSION:
            state = SavedState(**fields)
            _require_types(state)
            return state
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: {file.name} is missing; name an iter_NNNNNNN directory"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); choose another checkpoint") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); choose another checkpoint") from error
    raise CheckpointError(
        f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}; use the program version that wrote "
        "it, or start a new run (--fresh)"
    )


def _require_types(state: SavedState) -> None:
    """Every field is of its kind, so that a resume fails here or not at all.

    Raises:
        TypeError: names the first that is not.
    """
    guard = state.records.get("guard", {}) if _is_mapping_of(state.records, dict) else {}
    right = {
        "step": _is_count(state.step),
        "consumed_samples": _is_count(state.consumed_samples),
        "cursor": isinstance(state.cursor, dict),
        "layout": _is_mapping_of(state.layout, int),
        "params_dtype": isinstance(state.params_dtype, str),
        "tokenizer_hash": isinstance(state.tokenizer_hash, str),
        "records": _is_mapping_of(state.records, dict),
        "records.guard.losses": _is_list_of(guard.get("losses", []), int | float),
        "records.guard.norms": _is_list_of(guard.get("norms", []), int | float),
        "records.guard.interventions": _is_count(guard.get("interventions", 0)),
        "parts": _is_list_of(state.parts, str),
        "averaged": _is_list_of(state.averaged, str),
        "resharded_from": _is_mapping_of(state.resharded_from, int),
        "global_hash": isinstance(state.global_hash, str),
    }
    for name, sound in right.items():
        if not sound:
            raise TypeError(f"{name} is of another kind than it should be")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_list_of(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _is_mapping_of(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())
