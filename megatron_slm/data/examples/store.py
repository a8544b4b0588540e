"""Compiled examples of one split, memory-mapped.

What is read::

    SPLIT/index.json            what it is: kind, tokenizer, template, counts, digest, and the sha256 of every file
    SPLIT/documents.arrow       one row a document, columns of :data:`DOCUMENT_COLUMNS`
    SPLIT/shard-00000.arrow ... the documents' tokens one after another: ``tokens``, ``weights`` (as a label; 0 is not
                                trained), ``roles`` (place in :data:`ROLES`). No document is cut by the end of a shard.

Of preferences, documents 2k and 2k + 1 are the chosen and the rejected answer of pair k.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_slm.data.shards import INDEX_NAME, file_sha256
from megatron_slm.errors import DataError

EXAMPLES_VERSION = 1
"""Raised when what is stored would be read otherwise."""

KINDS = ("chat", "preference", "prompt")
ROLES = ("template", "system", "user", "assistant", "rationale", "tool")
"""Who made a token: the last but "template", which is what the template adds, are the roles of messages. "rationale" is
the part of an assistant's message before its answer."""

TEMPLATE, ASSISTANT, RATIONALE = ROLES.index("template"), ROLES.index("assistant"), ROLES.index("rationale")
STREAM_COLUMNS = ("tokens", "weights", "roles")
DOCUMENT_COLUMNS = ("shard", "start", "length", "number", "source", "margin", "score", "fields")
DIGEST_FACTS = ("kind", "vocab_size", "eod_id", "tokenizer_hash")
DOCUMENTS_NAME = "documents.arrow"
REMEDY = "Run `mslm data examples` again into a new directory, or copy the examples anew."


class ExampleStore:
    """The documents of one split. Made by :meth:`open`; safe to share between threads and to inherit by fork.

    Attributes:
        kind: one of :data:`KINDS`.
        num_documents: of preferences, two a pair.
        longest: tokens of the longest document.
        digest: of everything a model is trained on, whatever the files look like.
        template_sha256: of the template that the documents were rendered with; None: raw text.
        lengths: int64 [documents], tokens of each.
        scores: float32 [documents], NaN where none was given.
        margins: float32 [documents], 0 where none was given.
    """

    def __init__(self, directory: Path, index: dict[str, Any], documents: Any, shards: list[dict[str, np.ndarray]]):
        self.directory, self.index = directory, index
        self.kind: str = index["kind"]
        self.num_documents: int = index["num_documents"]
        self.num_tokens: int = index["num_tokens"]
        self.longest: int = index["longest"]
        self.digest: str = index["digest"]
        self.tokenizer_hash: str = index["tokenizer_hash"]
        self.template_sha256: str | None = index["template_sha256"]
        self.vocab_size: int = index["vocab_size"]
        self.eod_id: int = index["eod_id"]
        self.sources: list[str] = index["sources"]
        self._shards = shards
        self._fields = documents.column("fields")
        columns = {name: documents.column(name).to_numpy() for name in DOCUMENT_COLUMNS[:-1]}
        self._shard, self._start = columns["shard"], columns["start"]
        self.lengths: np.ndarray = columns["length"]
        self.numbers: np.ndarray = columns["number"]
        self.source: np.ndarray = columns["source"]
        self.margins: np.ndarray = columns["margin"]
        self.scores: np.ndarray = columns["score"]

    @staticmethod
    def open(directory: str | Path, verify: str = "size") -> ExampleStore:
        """Map the split in ``directory`` (``<data_path>/train`` or ``<data_path>/valid``).

        Args:
            verify: "size" compares the length of every file with the index; "hash" also its sha256.

        Raises:
            DataError: something is missing or damaged; the message names the file.
        """
        assert verify in ("size", "hash"), f"verify is size or hash, not {verify}"
        root = Path(directory)
        index = _read_index(root / INDEX_NAME)
        try:
            documents = map_batch(root / DOCUMENTS_NAME, index["documents"], DOCUMENT_COLUMNS, verify)
            shards = [_columns(map_batch(root / one["file"], one, STREAM_COLUMNS, verify)) for one in index["shards"]]
            store = ExampleStore(root, index, documents, shards)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{root / INDEX_NAME} is damaged: {error!r} is missing or of a wrong type. {REMEDY}"
            ) from error
        held = sum(len(shard["tokens"]) for shard in shards)
        if (len(store.lengths), held) != (store.num_documents, store.num_tokens):
            raise DataError(
                f"{root / INDEX_NAME} promises {store.num_documents} documents of {store.num_tokens} tokens, but its "
                f"files hold {len(store.lengths)} of {held}. {REMEDY}"
            )
        return store

    def tokens(self, document: int) -> np.ndarray:
        """Tokens [n] of a document in the stored type; read-only, a view of the file."""
        return self._column("tokens", document)

    def weights(self, document: int) -> np.ndarray:
        """float32 [n]: the weight of each token as a label."""
        return self._column("weights", document)

    def roles(self, document: int) -> np.ndarray:
        """uint8 [n]: who made each token, a place in :data:`ROLES`."""
        return self._column("roles", document)

    def fields(self, document: int) -> dict[str, Any]:
        """What a prompt's row says beside its messages (``answer``, ``verifier`` ...); empty of other kinds."""
        text = self._fields[document].as_py()
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def content_digest(self) -> str:
        """:attr:`digest`, of what is really there."""
        found = ExampleDigest(self.index)
        for document in range(self.num_documents):
            fields = self._fields[document].as_py()
            found.update(self.tokens(document), self.weights(document), float(self.margins[document]), fields)
        return found.hexdigest()

    def _column(self, name: str, document: int) -> np.ndarray:
        start = self._start[document]
        return self._shards[self._shard[document]][name][start : start + self.lengths[document]]


def holds_examples(directory: str | Path) -> bool:
    """Whether ``directory`` is a split of compiled examples, and not of a corpus or nothing that can be read."""
    try:
        return "examples_version" in json.loads(Path(directory, INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class ExampleDigest:
    """The identity of a split: what a model is trained on, not how it is cut into shards.

    Args:
        facts: those of :data:`DIGEST_FACTS` and others. What a template has made is in the documents.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        header = {name: facts[name] for name in DIGEST_FACTS}
        self._hash = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + b"\n")

    def update(self, tokens: np.ndarray, weights: np.ndarray, margin: float, fields: str) -> None:
        """Append one document."""
        # The length in front: else two documents could be one.
        self._hash.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, dtype="<i4").tobytes())
        self._hash.update(np.append(weights, margin).astype("<f4").tobytes() + fields.encode() + b"\n")

    def hexdigest(self) -> str:
        """sha256 of the header and of all documents so far."""
        return self._hash.hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: {path.parent} is no split of compiled examples. Give the directory that `mslm "
            "data examples` wrote."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). {REMEDY}") from error
    version = index.get("examples_version") if isinstance(index, dict) else None
    if version != EXAMPLES_VERSION:
        raise DataError(
            f"{path} has examples_version {version}, but this program reads {EXAMPLES_VERSION}; a corpus of text is "
            "given as data.data_path of a pretraining run or as a replayed source. " + REMEDY
        )
    checked: dict[str, Any] = index
    return checked


def map_batch(path: Path, facts: dict[str, Any], columns: tuple[str, ...], verify: str, remedy: str = REMEDY) -> Any:
    """The one record batch of ``path``, as a view of the file.

    Args:
        facts: its ``bytes`` and ``sha256``.
        columns: that it must have.
        verify: of :meth:`ExampleStore.open`.
        remedy: what a refusal advises.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes != facts["bytes"]:
            raise DataError(f"{path} has {num_bytes} bytes, but the index promises {facts['bytes']}. {remedy}")
        if verify == "hash" and (found := file_sha256(path)) != facts["sha256"]:
            raise DataError(f"{path} is damaged: sha256 {found}, but the index promises {facts['sha256']}. {remedy}")
        with pa.memory_map(str(path), "r") as source:
            batch = pa.ipc.open_file(source).get_batch(0)
    except FileNotFoundError as error:
        raise DataError(f"The file {path} is missing. {remedy}") from error
    except OSError as error:
        raise DataError(f"Cannot map {path}: {error}. {remedy}") from error
    except pa.ArrowException as error:
        raise DataError(f"{path} is damaged: {error}. {remedy}") from error
    if tuple(batch.schema.names) != columns:
        raise DataError(f"{path} has the columns {batch.schema.names}, not {list(columns)}. {remedy}")
    return batch


def _columns(batch: Any) -> dict[str, np.ndarray]:
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in STREAM_COLUMNS}
