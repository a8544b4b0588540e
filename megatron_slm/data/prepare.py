"""Text to a corpus: tokenizer, packed shards and their description, published in one rename.

What is written::

    OUTPUT/manifest.json                      what was asked for, and what came of it
    OUTPUT/card.md                            the same for a reader
    OUTPUT/tokenizer/{tokenizer.model,facts.json}
    OUTPUT/train/{shard-00000.arrow,...,index.json}
    OUTPUT/valid/{...}                        absent with split 0

The inputs are read three times: to judge every document, to train the tokenizer on those that are kept, and to tokenise
them. The first and the last are done in chunks by worker processes, and each finished chunk is kept beside the output,
so that the same command after a kill goes on where it stopped. The result depends on neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.documents import DEFAULT_PATTERN, Source, open_sources
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.preparation.publishing import assemble
from megatron_slm.data.preparation.reading import Reader, as_it_is, chunking, scrubbed
from megatron_slm.data.preparation.request import Request
from megatron_slm.data.preparation.screening import screen
from megatron_slm.data.preparation.staging import open_staging, remove_leftover
from megatron_slm.data.preparation.tokenising import make_tokenizer, tokenise
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.readers import require_regular
from megatron_slm.data.shards import DEFAULT_SHARD_TOKENS
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

TOKENIZER_PATH = Path("tokenizer", "tokenizer.model")


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer_model: str | Path | None = None,
    tokenizer_type: str | None = None,
    eod_token: str | None = None,
    split: float = 0.05,
    seed: int = 1234,
    text_key: str = "text",
    text_unit: str = "paragraph",
    pattern: str = DEFAULT_PATTERN,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    licence: str | None = None,
    quality: QualityConfig | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Write the corpus of ``inputs`` to ``output``, which appears complete or not at all.

    Args:
        inputs: files and directories (see :mod:`megatron_slm.data.documents`); their documents are numbered through.
        vocab_size: size of the tokenizer to train on the train split; default 4096.
        tokenizer_model: take this tokenizer instead of training one.
        tokenizer_type: of a tokenizer that is trained, "bpe" (default) or "unigram".
        eod_token: token of ``tokenizer_model`` that ends a document, where it does not say so itself.
        split: share of the documents for the valid split, in [0, 1); each is assigned by a hash of ``seed`` and number.
        text_unit: what one document of a ``.txt`` file is, "paragraph" or "file".
        pattern: which files of a directory are read.
        licence: of all inputs; default what each says about itself.
        quality: which documents are dropped and what is scrubbed; default nothing.
        workers: processes that judge and tokenise. With more than one, a program that calls this must be safe to
            import (``if __name__ == "__main__"``), as :mod:`multiprocessing` asks.

    Returns:
        The manifest, with ``already_prepared``: true when ``output`` held the corpus of an equal request.

    Raises:
        DataError: an input cannot be read, ``output`` holds something else, or a value is out of range.
        ResumableError: the disk is full or a worker died; the same command goes on from there.
    """
    target = Path(output).absolute()
    _check_names([*inputs, target, *(quality.leakage_against if quality else ())])
    given = _given_tokenizer(tokenizer_model, eod_token, vocab_size=vocab_size, tokenizer_type=tokenizer_type)
    quality = None if quality == QualityConfig() else quality
    reader = _reader(inputs, given, quality, text_key=text_key, text_unit=text_unit, pattern=pattern)
    request = Request.of(
        reader,
        given,
        quality,
        vocab_size=vocab_size,
        tokenizer_type=tokenizer_type,
        split=split,
        seed=seed,
        shard_tokens=shard_tokens,
        licence=licence,
    )
    return _prepared(target, request, reader, given, quality, workers)


def _prepared(
    target: Path, request: Request, reader: Reader, given: Tokenizer | None, quality: QualityConfig | None, workers: int
) -> dict[str, Any]:
    """The passes, one after another; each takes what an earlier command has finished of it."""
    if workers < 1:
        raise DataError(f"--workers is {workers}, but at least 1 process does the work.")
    if os.path.lexists(target):
        return {**_existing(target, request, reader.sources), "already_prepared": True}
    with open_staging(target, request, chunking()) as staging:
        screening = screen(staging, reader, request, quality, workers)
        tokenizer = make_tokenizer(staging, reader, request, screening, given)
        tokenise(staging, reader, screening, tokenizer, workers)
        manifest = assemble(staging, request, screening, reader.sources, tokenizer)
        staging.publish(target)
    return {**manifest, "already_prepared": False}


def _check_names(paths: Iterable[str | Path]) -> None:
    """Refuse, before any work, names that the manifest and the card could not hold."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The name {os.fsencode(path)!r} is not UTF-8, as manifest and card are. Rename it."
            ) from error


def _given_tokenizer(
    path: str | Path | None, eod_token: str | None, *, vocab_size: int | None, tokenizer_type: str | None
) -> Tokenizer | None:
    if path is None:
        if eod_token is not None:
            raise DataError(
                f"--eod-token {eod_token} names a token of a finished tokenizer, but a new one is trained, which "
                "has its own. Add --tokenizer-model, or drop it."
            )
        return None
    if vocab_size is not None or tokenizer_type is not None:
        name, own = ("--tokenizer-type", "type") if vocab_size is None else ("--vocab-size", "size")
        raise DataError(
            f"{name} and --tokenizer-model are both given: a finished tokenizer has its own {own}. Drop one."
        )
    require_regular(Path(path))
    return Tokenizer.open(path, eod_token=eod_token)


def _reader(
    inputs: Sequence[str | Path],
    given: Tokenizer | None,
    quality: QualityConfig | None,
    *,
    text_key: str,
    text_unit: str,
    pattern: str,
) -> Reader:
    """The inputs, hashed; those that hold tokens are refused where text is needed."""
    if not inputs:
        raise DataError("No input file was given. Name at least one .txt or .jsonl file.")
    sources = open_sources(inputs, pattern=pattern)
    for source in sources:
        if source.kind == "tokens" and given is None:
            raise DataError(
                f"{source.path} holds token ids, which mean nothing without the tokenizer they were made with. Name it "
                "with --tokenizer-model."
            )
        if source.kind == "tokens" and quality is not None:
            raise DataError(
                f"{source.path} holds token ids, which no filter of text can judge. Drop the filters, or prepare this "
                "input by itself."
            )
    return Reader(
        tuple(sources),
        text_key,
        text_unit,
        pattern,
        eod_id=given.eod_id if given else None,
        scrub=scrubbed if quality and quality.scrub_pii else as_it_is,
    )


def _existing(target: Path, request: Request, sources: Sequence[Source]) -> dict[str, Any]:
    """The manifest of ``target`` when it answers an equal request."""
    remedy = "Choose another output, or remove this one yourself."
    try:
        manifest = read_manifest(target)
        changes = _changed_inputs(manifest["sources"], sources)
        # The inputs are named above; here their hashes would say nothing to a person.
        if others := request.differences({**manifest["request"], "inputs": list(request.inputs)}):
            changes.append(others)
        splits = list(manifest["splits"])
        tokenizer_hash = manifest["tokenizer"]["hash"]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{target} exists and is no prepared corpus. {remedy}") from error
    if changes:
        raise DataError(f"{target} holds another corpus: {'; '.join(changes)}. {remedy}")
    for name in splits:
        Corpus.open(target / name, verify="hash")
    Tokenizer.open(target / "tokenizer", tokenizer_hash)
    remove_leftover(target)
    return manifest


def _changed_inputs(stored: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> list[str]:
    """Which inputs are not those that the manifest's ``sources`` tell of; where they lie does not matter."""
    if len(stored) != len(sources):
        return [f"it is of {len(stored)} inputs, {len(sources)} were given"]
    changed = []
    for number, (before, now) in enumerate(zip(stored, sources, strict=True), start=1):
        if before["sha256"] == now.sha256:
            continue
        if before["path"] == str(now.path):
            changed.append(f"the input {now.path} has changed since")
        else:
            changed.append(f"input {number} was {before['path']}, {now.path} holds something else")
    return changed
