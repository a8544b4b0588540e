"""Text files to a corpus: tokenizer, packed shards and their description, published in one rename.

What is written::

    OUTPUT/manifest.json                      what was asked for, and what came of it
    OUTPUT/tokenizer/{tokenizer.model,tokenizer.json}
    OUTPUT/train/{shard-00000.arrow,...,index.json}
    OUTPUT/valid/{...}                        absent with split 0
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.documents import TEXT_UNITS, Source, in_tokenizer_sample, in_valid, read_documents
from megatron_slm.data.shards import DEFAULT_SHARD_TOKENS, SCHEMA_VERSION, ShardWriter, write_json
from megatron_slm.data.tokenizer import NUM_FIXED_PIECES, Tokenizer, train_tokenizer
from megatron_slm.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_PATH = Path("tokenizer", "tokenizer.model")
DEFAULT_VOCAB_SIZE = 4096
TOKENIZER_TRAINING_CHARACTERS = 200_000_000
"""From a larger train split, a deterministic share of the documents is drawn for the tokenizer: it trains in memory."""

BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Request:
    """Everything that decides the content of a corpus; two equal requests give equal corpora."""

    schema_version: int
    inputs: tuple[str, ...]
    vocab_size: int | None
    tokenizer_hash: str | None
    split: float
    seed: int
    text_key: str
    text_unit: str
    shard_tokens: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.split < 1.0:
            raise DataError(f"--split is {self.split}, but the share of the valid split lies in [0, 1); 0.05 is usual.")
        # Beyond these bounds sentencepiece answers with its own insides.
        if self.vocab_size is not None and not NUM_FIXED_PIECES <= self.vocab_size < 1 << 31:
            raise DataError(
                f"--vocab-size is {self.vocab_size}, but the control pieces, the line break and the 256 bytes alone "
                f"are {NUM_FIXED_PIECES} pieces, each character of the text is one more, and ids have 31 bits; "
                f"{DEFAULT_VOCAB_SIZE} is the default."
            )
        if self.text_unit not in TEXT_UNITS:
            raise DataError(f"--text-unit is {self.text_unit}, but it must be one of {', '.join(TEXT_UNITS)}.")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens is {self.shard_tokens}, but a shard holds at least one token.")


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer_model: str | Path | None = None,
    split: float = 0.05,
    seed: int = 1234,
    text_key: str = "text",
    text_unit: str = "paragraph",
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write the corpus of ``inputs`` to ``output``, which appears complete or not at all.

    Args:
        inputs: ``.txt`` and ``.jsonl`` files (see :mod:`megatron_slm.data.documents`).
        vocab_size: size of the tokenizer to train on the train split; default 4096.
        tokenizer_model: take this sentencepiece model instead of training one.
        split: share of the documents for the valid split, in [0, 1); each is assigned by a hash of its number.
        seed: key of the assignment.
        text_unit: what one document of a ``.txt`` file is, "paragraph" or "file".
        licence: note stored with the sources.

    Returns:
        The manifest, with ``already_prepared``: true when ``output`` held the corpus of an equal request.

    Raises:
        DataError: an input cannot be read, ``output`` holds something else, or a value is out of range.
    """
    if vocab_size is not None and tokenizer_model is not None:
        raise DataError(
            "--vocab-size and --tokenizer-model are both given: a finished tokenizer has its own size. Drop one."
        )
    if not inputs:
        raise DataError("No input file was given. Name at least one .txt or .jsonl file.")
    sources = [Source.of(Path(path)) for path in inputs]
    given = Tokenizer.open(tokenizer_model) if tokenizer_model is not None else None
    request = Request(
        schema_version=SCHEMA_VERSION,
        inputs=tuple(source.sha256 for source in sources),
        vocab_size=DEFAULT_VOCAB_SIZE if vocab_size is None and given is None else vocab_size,
        tokenizer_hash=given.hash if given else None,
        split=split,
        seed=seed,
        text_key=text_key,
        text_unit=text_unit,
        shard_tokens=shard_tokens,
    )
    target = Path(output).absolute()
    if os.path.lexists(target):
        return {**_existing(target, request), "already_prepared": True}
    with _building(target) as directory:
        manifest = _build(directory, sources, request, given, licence)
    return {**manifest, "already_prepared": False}


def _build(
    directory: Path, sources: Sequence[Source], request: Request, given: Tokenizer | None, licence: str | None
) -> dict[str, Any]:
    def documents() -> Iterator[tuple[int, str]]:
        return enumerate(read_documents(sources, text_key=request.text_key, text_unit=request.text_unit))

    counts = _count(documents(), request)
    (directory / "tokenizer").mkdir()
    tokenizer = _make_tokenizer(directory / TOKENIZER_PATH, documents, counts, request, given)
    described = [
        {"name": source.path.name, "sha256": source.sha256, "bytes": source.num_bytes, "licence": licence}
        for source in sources
    ]
    indices = _write_splits(directory, documents(), counts, request, tokenizer, described)
    manifest = {
        "request": json.loads(json.dumps(asdict(request))),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
        "splits": {
            name: {key: index[key] for key in ("num_documents", "num_tokens", "digest")}
            | {"num_characters": counts[name][1], "num_shards": len(index["shards"])}
            for name, index in indices.items()
        },
    }
    write_json(directory / MANIFEST_NAME, manifest)
    return manifest


def _count(documents: Iterator[tuple[int, str]], request: Request) -> dict[str, tuple[int, int]]:
    """Documents and characters of each split; reads everything once, so that bad input is refused before any work."""
    numbers = {"train": [0, 0], "valid": [0, 0]}
    for document, text in documents:
        split = numbers["valid" if in_valid(request.seed, document, request.split) else "train"]
        split[0] += 1
        split[1] += len(text)
    total = numbers["train"][0] + numbers["valid"][0]
    if not total:
        raise DataError("The inputs hold no document: every one is empty. Give some text.")
    wanted = ["train", "valid"] if request.split else ["train"]
    for name in wanted:
        if not numbers[name][0]:
            raise DataError(
                f"With --split {request.split} and --seed {request.seed} the {name} split gets none of the {total} "
                "documents. Give more documents, change --split (0 makes no valid split), or change --seed."
            )
    return {name: (numbers[name][0], numbers[name][1]) for name in wanted}


def _make_tokenizer(
    path: Path,
    documents: Callable[[], Iterator[tuple[int, str]]],
    counts: dict[str, tuple[int, int]],
    request: Request,
    given: Tokenizer | None,
) -> Tokenizer:
    if given:
        path.write_bytes(given.model)
        tokenizer, trained_on = Tokenizer(given.model, path), None
    else:
        assert request.vocab_size is not None, "a tokenizer is trained when none was given, and has a size"
        share = min(1.0, TOKENIZER_TRAINING_CHARACTERS / counts["train"][1])
        training_text = (
            text
            for document, text in documents()
            if not in_valid(request.seed, document, request.split)
            and in_tokenizer_sample(request.seed, document, share)
        )
        tokenizer = train_tokenizer(training_text, request.vocab_size, path)
        trained_on = "train split" if share == 1.0 else f"{share:.3f} of the train split's documents"
    facts = {
        "kind": "sentencepiece",
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "sha256": tokenizer.hash,
        "trained_on": trained_on,
    }
    write_json(path.with_name("tokenizer.json"), facts)
    return tokenizer


def _write_splits(
    directory: Path,
    documents: Iterator[tuple[int, str]],
    counts: dict[str, tuple[int, int]],
    request: Request,
    tokenizer: Tokenizer,
    sources: list[dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Tokenise everything once; returns the index of each split."""
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for name in counts:
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
        total = sum(documents for documents, _ in counts.values())
        # disable=None: no bar unless standard error is a terminal.
        bar = stack.enter_context(tqdm(total=total, desc="tokenise", unit="document", disable=None))
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
            for (document, _), ids in zip(batch, encoded, strict=True):
                name = "valid" if in_valid(request.seed, document, request.split) else "train"
                try:
                    writers[name].add_document(ids)
                except ValueError as error:
                    raise DataError(f"Document {document} cannot be stored: {error}. Use another tokenizer.") from error
            bar.update(len(batch))
    return {name: writer.index for name, writer in writers.items()}


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _existing(target: Path, request: Request) -> dict[str, Any]:
    """The manifest of ``target`` when it answers an equal request."""
    remedy = "Choose another output, or remove this one yourself."
    try:
        manifest: dict[str, Any] = json.loads((target / MANIFEST_NAME).read_text(encoding="utf-8"))
        found = manifest["request"]
        splits = list(manifest["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{target} exists and is no prepared corpus. {remedy}") from error
    wanted = json.loads(json.dumps(asdict(request)))
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        values = "; ".join(f"{name} is {found.get(name)} there, {wanted[name]} was asked for" for name in changed)
        raise DataError(f"{target} holds another corpus: {values}. {remedy}")
    for name in splits:
        Corpus.open(target / name, verify="hash")
    Tokenizer.open(target / TOKENIZER_PATH, manifest["tokenizer"]["hash"])
    return manifest


@contextlib.contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that becomes ``target`` when the block ends well, and is removed when it does not.

    A kill leaves only ``.NAME.preparing``; the next run finds it unlocked and starts over in it.
    """
    staging = target.with_name(f".{target.name}.preparing")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"Cannot write beside {target}: {error.strerror}. Choose another output.") from error
    try:
        _lock(descriptor, staging, target)
        for left in staging.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield staging
            _sync_tree(staging)
            os.rename(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _sync(target.parent)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, staging: Path, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"Another process is preparing {target}. Wait for it, or choose another output.") from error
    # The other process may have published the directory between our opening it and our lock.
    if not staging.exists() or os.stat(staging).st_ino != os.fstat(descriptor).st_ino:
        raise DataError(f"Another process has just prepared {target}. Run the command again to check it.")


def _sync_tree(directory: Path) -> None:
    """Wait until everything in ``directory`` is on the disk, so that a crash cannot publish half of it."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
