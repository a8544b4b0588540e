"""The last pass: finished chunks become shards, beside the manifest that says what they are and where they are from."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_slm.data import card
from megatron_slm.data.documents import Source
from megatron_slm.data.manifest import write_manifest
from megatron_slm.data.preparation.request import Request
from megatron_slm.data.preparation.screening import Screening
from megatron_slm.data.preparation.staging import Staging, writing
from megatron_slm.data.preparation.tokenising import TOKENIZER, chunk_name
from megatron_slm.data.shards import INDEX_NAME, ShardWriter, file_sha256
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError


def assemble(
    staging: Staging, request: Request, screening: Screening, sources: Sequence[Source], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the whole corpus into the staging directory; returns its manifest.

    Raises:
        DataError: a document holds ids that the tokenizer has not, or an end of document inside.
        ResumableError: nothing can be written.
    """
    described = [_described(source, counts, request) for source, counts in zip(sources, screening.sources, strict=True)]
    directory = staging.begin_corpus()
    with writing(directory):
        shutil.copytree(staging.directory / TOKENIZER, directory / TOKENIZER, copy_function=shutil.copyfile)
        indices = _write_splits(staging, directory, request, screening, tokenizer, described)
        manifest = {
            "request": request.to_dict(),
            "tokenizer": {
                "kind": tokenizer.kind,
                "file": tokenizer.file_name,
                "hash": tokenizer.hash,
                "vocab_size": tokenizer.vocab_size,
                "eod_id": tokenizer.eod_id,
            },
            "sources": described,
            "dropped": _total(described, "dropped"),
            "scrubbed": _total(described, "scrubbed"),
            "evidence": screening.evidence,
            "splits": {
                name: {key: index[key] for key in ("num_documents", "num_tokens", "digest")}
                | {"num_characters": screening.splits[name]["num_characters"], "num_shards": len(index["shards"])}
                for name, index in indices.items()
            },
            "files": {
                str(path.relative_to(directory)): file_sha256(path)
                for path in (
                    *sorted(path for path in (directory / TOKENIZER).rglob("*") if path.is_file()),
                    *(directory / name / INDEX_NAME for name in indices),
                )
            },
        }
        card.write(directory, manifest)
        return write_manifest(directory, manifest)


def _described(source: Source, counts: dict[str, Any], request: Request) -> dict[str, Any]:
    """One input, as the manifest and the index of each split tell it."""
    return {
        "name": source.path.name,
        "path": str(source.path),
        "kind": source.kind,
        "sha256": source.sha256,
        "bytes": source.num_bytes,
        "files": len(source.files),
        "files_skipped": source.num_skipped,
        "pattern": request.pattern if source.kind == "tree" else None,
        "licence": request.licence or source.licence,
        **counts,
    }


def _total(sources: Sequence[dict[str, Any]], kind: str) -> dict[str, int]:
    """Over all inputs, by reason or pattern."""
    total: Counter[str] = Counter()
    for source in sources:
        total.update(source[kind])
    return dict(sorted(total.items()))


def _write_splits(
    staging: Staging,
    directory: Path,
    request: Request,
    screening: Screening,
    tokenizer: Tokenizer,
    sources: list[dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The chunks in order, each document into its split; returns the index of each split."""
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for name in screening.splits:
            (directory / name).mkdir()
            writers[name] = stack.enter_context(
                ShardWriter(
                    directory / name,
                    vocab_size=tokenizer.vocab_size,
                    eod_id=tokenizer.eod_id,
                    tokenizer_hash=tokenizer.hash,
                    shard_tokens=request.shard_tokens,
                    sources=sources,
                )
            )
        for chunk in tqdm(range(screening.num_chunks), desc="write shards", unit="chunk", disable=None):
            _write_chunk(staging, chunk, writers, request, screening)
    return {name: writer.index for name, writer in writers.items()}


def _write_chunk(
    staging: Staging, chunk: int, writers: dict[str, ShardWriter], request: Request, screening: Screening
) -> None:
    stored = staging.load_finished(chunk_name(chunk))
    ids, place = stored["ids"], 0
    numbers = screening.kept(chunk).nonzero()[0] + screening.starts[chunk]
    for document, length in zip(numbers.tolist(), stored["lengths"].tolist(), strict=True):
        try:
            writers[request.split_of(document)].add_document(ids[place : place + length])
        except ValueError as error:
            raise DataError(f"Document {document} cannot be stored: {error}. Use another tokenizer.") from error
        place += length
