"""``manifest.json`` of a prepared corpus: what was asked for, what came of it, and the hash of every small file in it.

The shards' hashes are in the index of their split, whose hash is here; the manifest holds its own, so that no file of a
corpus can change unseen.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_slm.data.shards import write_json
from megatron_slm.errors import DataError

MANIFEST_NAME = "manifest.json"
OWN_HASH = "manifest_sha256"
"""Key of the hash of everything else in the manifest."""


def write_manifest(directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``content`` with its hash into ``directory``; returns what was written."""
    sealed = {**content, OWN_HASH: _hash(content)}
    write_json(directory / MANIFEST_NAME, sealed)
    return sealed


def read_manifest(data_path: str | Path) -> dict[str, Any]:
    """The manifest of a prepared corpus.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(data_path, MANIFEST_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Give the directory that `mslm data prepare` wrote."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Copy the corpus anew.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("request", "splits")):
        raise DataError(f"{path} is no manifest of a prepared corpus: it names no request and no splits.")
    return content


def manifest_is_whole(manifest: dict[str, Any]) -> bool:
    """Whether the manifest is as it was written."""
    return manifest.get(OWN_HASH) == _hash({key: value for key, value in manifest.items() if key != OWN_HASH})


def _hash(content: dict[str, Any]) -> str:
    # Not the file's own bytes: those would hold their hash.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
