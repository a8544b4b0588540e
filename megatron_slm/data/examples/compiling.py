"""Rows of JSON to examples: tokens with the weight of each as a label, published in one rename.

What is written::

    OUTPUT/manifest.json                what was asked for, and what came of it
    OUTPUT/tokenizer/{tokenizer.model,facts.json,chat_template.jinja}
    OUTPUT/train/{index.json,documents.arrow,shard-00000.arrow ...}
    OUTPUT/valid/{...}                  absent with a share of 0, or when it got no row

Finished chunks are kept beside the output, so that the same command after a kill goes on where it stopped. The result
depends on neither that nor the number of workers. Rows of one opening (what is said before the first answer) are in the
same split, by a hash of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.data.documents import Source, open_sources
from megatron_slm.data.examples.assembling import assemble, chunk_name
from megatron_slm.data.examples.encoding import ExampleEncoder
from megatron_slm.data.examples.evaluation import evaluation_texts
from megatron_slm.data.examples.making import CHUNK_ROWS, Maker, RowChunk, chunks_of
from megatron_slm.data.examples.reading import check_sources
from megatron_slm.data.examples.request import ExamplesRequest, Options
from megatron_slm.data.examples.special_tokens import TemplateTokenizer
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.template import open_template
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.preparation.staging import Staging, open_staging, remove_leftover, say
from megatron_slm.data.preparation.workers import map_in_order
from megatron_slm.data.readers import require_regular
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError


def compile_examples(
    inputs: Sequence[str | Path],
    output: str | Path,
    options: Options,
    *,
    tokenizer_model: str | Path,
    template: str | Path | None = None,
    eod_token: str | None = None,
    check_against: Sequence[str | Path] = (),
    workers: int = 1,
) -> dict[str, Any]:
    """Write the examples of ``inputs`` to ``output``, which appears complete or not at all.

    Args:
        inputs: .jsonl (also .gz, .zst) or .parquet; their rows are numbered through.
        tokenizer_model: a tokenizer's file, or the directory that holds it.
        template: a built-in one by name, or a file; default the tokenizer's own.
        eod_token: of the tokenizer, what ends a document, where it does not say so itself.
        check_against: evaluation files; rows that they ask about are left out.
        workers: processes; see :func:`megatron_slm.data.prepare.prepare`.

    Returns:
        The manifest, with ``already_prepared``: true when ``output`` held the examples of an equal request.

    Raises:
        DataError: an input cannot be read, a row cannot be used, ``output`` holds something else, or nothing is left.
        ResumableError: the disk is full or a worker died; the same command goes on from there.
    """
    if workers < 1:
        raise DataError(f"--workers is {workers}, but at least 1 process does the work.")
    if not inputs:
        raise DataError("No input file was given. Name at least one .jsonl or .parquet file.")
    require_regular(Path(tokenizer_model))
    tokenizer = Tokenizer.open(tokenizer_model, eod_token=eod_token)
    chat = open_template(template, tokenizer)
    encoder = ExampleEncoder(TemplateTokenizer(tokenizer), chat, options.rationale_weight)
    sources, evaluation = open_sources(inputs), open_sources(check_against)
    check_sources([*sources, *evaluation])
    request = ExamplesRequest.of(
        options, [one.sha256 for one in sources], [one.sha256 for one in evaluation], tokenizer, chat.sha256
    )
    target = Path(output).absolute()
    if os.path.lexists(target):
        return {**_existing(target, request), "already_prepared": True}
    with open_staging(target, request, {"rows": CHUNK_ROWS}) as staging:
        wanted = evaluation_texts(evaluation, options.leak_share) if evaluation else None
        num_chunks = _make(staging, sources, Maker(options, encoder, wanted), workers)
        manifest = assemble(staging, request, sources, encoder, num_chunks)
        staging.publish(target)
    return {**manifest, "already_prepared": False}


def _make(staging: Staging, sources: Sequence[Source], maker: Maker, workers: int) -> int:
    """Turn every chunk into documents that an earlier command has not finished, each kept as it is done; how many
    chunks there are.
    """
    started, rows, total, found = time.monotonic(), 0, 0, 0

    def missing() -> Iterator[RowChunk]:
        nonlocal total, found
        for chunk in chunks_of(sources):
            total = chunk.number + 1
            if staging.has(chunk_name(chunk.number)):
                found += 1
            else:
                yield chunk

    for number, count, arrays in map_in_order(maker, missing(), workers):
        staging.save(chunk_name(number), **arrays)
        rows += count
    seconds = time.monotonic() - started
    if found:
        say(f"{found} of {total} chunks were finished by an earlier start and are kept")
    say(f"read {rows:,} rows in {seconds:.1f} s: {rows / max(seconds, 1e-3):,.0f} rows/s, --workers {workers}")
    return total


def _existing(target: Path, request: ExamplesRequest) -> dict[str, Any]:
    """The manifest of ``target`` when it answers an equal request."""
    remedy = "Choose another output, or remove this one yourself."
    try:
        manifest = read_manifest(target)
        changes = request.differences(manifest["request"])
        splits = list(manifest["splits"])
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{target} exists and holds no compiled examples. {remedy}") from error
    if changes:
        raise DataError(f"{target} holds other examples: {changes}. {remedy}")
    for name in splits:
        ExampleStore.open(target / name, verify="hash")
    remove_leftover(target)
    return manifest
