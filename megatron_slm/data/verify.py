"""Whether a prepared corpus is what was prepared: every file read and hashed, every problem listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.corpus import Corpus, map_shard, read_index
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.manifest import manifest_is_whole, read_manifest
from megatron_slm.data.shards import INDEX_NAME, file_sha256
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

REMEDY = "Copy the corpus anew, or prepare it again into a new directory."

WINDOW_TOKENS = 1 << 22


@dataclass
class Verification:
    """What was read, and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    """One sentence each; none when the corpus is sound."""
    num_splits: int = 0
    num_shards: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.num_splits} splits, {self.num_shards} shards, {self.num_documents:,} documents, "
            f"{self.num_tokens:,} tokens, {self.num_bytes:,} bytes"
        )


def verify(data_path: str | Path) -> Verification:
    """Read and hash everything in a prepared corpus.

    Raises:
        DataError: there is no readable manifest, so nothing says what the corpus should be.
    """
    root, found = Path(data_path), Verification()
    manifest = read_manifest(root)
    if not manifest_is_whole(manifest):
        found.problems.append(f"{root}/manifest.json was changed: its content has another hash than it holds. {REMEDY}")
    found.problems += _small_files(root, manifest)
    found.problems += _tokenizer(root, manifest)
    split = _examples if "kind" in manifest else _split
    for name, facts in manifest["splits"].items():
        found.problems += split(root / name, facts, found)
    return found


def _small_files(root: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for name, wanted in manifest.get("files", {}).items():
        try:
            sha256 = file_sha256(root / name)
        except OSError as error:
            yield f"Cannot read {root / name}: {error.strerror}. {REMEDY}"
            continue
        if sha256 != wanted:
            yield f"{root / name} is damaged: sha256 {sha256}, but the manifest promises {wanted}. {REMEDY}"


def _tokenizer(root: Path, manifest: dict[str, Any]) -> Iterator[str]:
    wanted = manifest.get("tokenizer", {})
    try:
        tokenizer = Tokenizer.open(root / "tokenizer", wanted.get("hash"))
    except DataError as error:
        yield str(error)
        return
    for key in ("vocab_size", "eod_id"):
        if getattr(tokenizer, key) != wanted.get(key):
            yield f"{tokenizer.path} has {key} {getattr(tokenizer, key)}, the manifest says {wanted.get(key)}. {REMEDY}"


def _split(directory: Path, facts: dict[str, Any], found: Verification) -> Iterator[str]:
    """The problems of one split; what was read is counted in ``found``."""
    found.num_splits += 1
    try:
        index = read_index(directory / INDEX_NAME)
        yield from (
            f"{directory / INDEX_NAME} has {key} {index.get(key)}, but the manifest promises {facts.get(key)}. {REMEDY}"
            for key in ("num_documents", "num_tokens", "digest")
            if index.get(key) != facts.get(key)
        )
        damaged = list(_shards(directory, index, found))
        yield from damaged
        if not damaged:
            yield from _stream(Corpus.open(directory), np.dtype(index["dtype"]), found)
    except DataError as error:
        yield str(error)
    except (KeyError, TypeError) as error:
        yield f"{directory / INDEX_NAME} is damaged: {error!r} is missing or of a wrong type. {REMEDY}"


def _examples(directory: Path, facts: dict[str, Any], found: Verification) -> Iterator[str]:
    """The problems of one split of compiled examples."""
    found.num_splits += 1
    try:
        store = ExampleStore.open(directory, verify="hash")
        digest = store.content_digest()
    except DataError as error:
        yield str(error)
        return
    found.num_shards += len(store.index["shards"])
    found.num_documents += store.num_documents
    found.num_tokens += store.num_tokens
    found.num_bytes += sum(one["bytes"] for one in (*store.index["shards"], store.index["documents"]))
    if not digest == store.digest == facts.get("digest"):
        yield (
            f"{directory} has the digest {digest}, but its index promises {store.digest} and the manifest "
            f"{facts.get('digest')}. {REMEDY}"
        )


def _shards(directory: Path, index: dict[str, Any], found: Verification) -> Iterator[str]:
    listed = {shard["file"]: shard for shard in index["shards"]}
    for name, shard in listed.items():
        found.num_shards += 1
        found.num_bytes += shard["bytes"]
        try:
            map_shard(directory / name, shard, index["dtype"], "hash")
        except DataError as error:
            yield str(error)
    for path in sorted(directory.iterdir()):
        if path.name not in (*listed, INDEX_NAME):
            yield f"{path} is not in the index. Remove it, if you know what it is."


def _stream(corpus: Corpus, dtype: np.dtype[Any], found: Verification) -> Iterator[str]:
    """The stream as a whole; its documents are counted by their ends."""
    num_documents = 0
    for start in range(0, corpus.num_tokens, WINDOW_TOKENS):
        tokens = corpus.tokens(start, min(start + WINDOW_TOKENS, corpus.num_tokens))
        num_documents += int(np.count_nonzero(tokens == corpus.eod_id))
    found.num_documents += num_documents
    found.num_tokens += corpus.num_tokens
    if num_documents != corpus.num_documents:
        yield (
            f"{corpus.directory} holds {num_documents} ends of documents, but its index promises "
            f"{corpus.num_documents}. {REMEDY}"
        )
    corpus.verify_digest(dtype)
