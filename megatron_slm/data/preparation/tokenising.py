"""The later readings: train the tokenizer on what is kept, then turn what is kept into chunks of ids."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_slm.data.documents import in_tokenizer_sample
from megatron_slm.data.preparation.reading import Chunk, Reader
from megatron_slm.data.preparation.request import Request
from megatron_slm.data.preparation.screening import Screening
from megatron_slm.data.preparation.staging import Staging, say, sync_tree, writing
from megatron_slm.data.preparation.workers import map_in_order
from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer
from megatron_slm.data.tokenizer_sentencepiece import SentencePieceModel
from megatron_slm.errors import DataError

TOKENIZER_TRAINING_CHARACTERS = 200_000_000
"""From a larger train split, a deterministic share of the documents is drawn for the tokenizer: it trains in memory."""

TOKENIZER = "tokenizer"
"""The tokenizer's directory, in the staging directory and in the corpus."""


@dataclass(frozen=True)
class Encoder:
    """Documents to ids, in any process."""

    tokenizer: Tokenizer
    scrub: Callable[[str], str]

    def __call__(self, task: tuple[Chunk, np.ndarray]) -> tuple[int, np.ndarray, np.ndarray]:
        """(chunk, [documents] bool which are kept) -> the chunk's number, [n] int32 ids of the kept, [kept] lengths."""
        chunk, kept = task
        documents = [document for document, keep in zip(chunk.documents, kept, strict=True) if keep]
        texts = [self.scrub(document) for document in documents if isinstance(document, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        ids = [_narrow(next(encoded) if isinstance(document, str) else document) for document in documents]
        lengths = np.array([len(document) for document in ids], dtype=np.int64)
        return chunk.number, np.concatenate([np.empty(0, np.int32), *ids]), lengths


def make_tokenizer(
    staging: Staging, reader: Reader, request: Request, screening: Screening, given: Tokenizer | None
) -> Tokenizer:
    """The given tokenizer, or one trained on the kept documents of the train split; kept in the staging directory.

    Raises:
        DataError: the text is too small for the vocabulary, or has more characters than that.
    """
    directory = staging.directory / TOKENIZER
    if not directory.exists():
        partial = staging.directory / f".tmp-{TOKENIZER}"
        with writing(directory):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            if given is None:
                _train(partial, reader, request, screening)
            else:
                given.save(partial, trained_on=None)
            sync_tree(partial)
            os.rename(partial, directory)
    return Tokenizer.open(directory)


def tokenise(staging: Staging, reader: Reader, screening: Screening, tokenizer: Tokenizer, workers: int) -> None:
    """Turn every chunk into ids that an earlier command has not finished, each kept as it is done."""
    missing = {number for number in range(screening.num_chunks) if not staging.has(chunk_name(number))}
    found = screening.num_chunks - len(missing)
    if found:
        say(f"{found} of {screening.num_chunks} chunks were tokenised by an earlier start and are kept")
    if not missing:
        return
    tasks = (
        (chunk, screening.kept(chunk.number))
        for chunk in reader.chunks()
        # A chunk of another length is of a file that has changed, which its reader refuses by name at its end.
        if chunk.number in missing and len(chunk.documents) == len(screening.kept(chunk.number))
    )
    encoder = Encoder(tokenizer, reader.scrub)
    started, num_documents = time.monotonic(), sum(len(screening.kept(number)) for number in missing)
    # disable=None: no bar unless standard error is a terminal.
    with tqdm(total=num_documents, desc="tokenise", unit="document", disable=None) as bar:
        for number, ids, lengths in map_in_order(encoder, tasks, workers):
            staging.save(chunk_name(number), ids=ids, lengths=lengths)
            bar.update(len(screening.kept(number)))
    seconds = time.monotonic() - started
    rate = num_documents / max(seconds, 1e-3)
    say(f"tokenised {num_documents:,} documents in {seconds:.1f} s: {rate:,.0f} documents/s, --workers {workers}")


def chunk_name(number: int) -> str:
    """What the ids of a chunk are kept under."""
    return f"tokens-{number:06d}"


def _train(directory: Path, reader: Reader, request: Request, screening: Screening) -> None:
    assert request.vocab_size is not None, "a tokenizer is trained when none was given, and has a size"
    assert request.tokenizer_type is not None, "a tokenizer is trained when none was given, and is of a type"
    share = min(1.0, TOKENIZER_TRAINING_CHARACTERS / screening.splits["train"]["num_characters"])
    texts = (
        reader.scrub(document)
        for number, (_, document) in enumerate(reader.documents())
        if isinstance(document, str)
        and screening.keeps(number)
        and request.split_of(number) == "train"
        and in_tokenizer_sample(request.seed, number, share)
    )
    refused: list[DataError] = []
    try:
        tokenizer = train_tokenizer(
            _recording(texts, refused),
            request.vocab_size,
            directory / SentencePieceModel.file_name,
            model_type=request.tokenizer_type,
        )
    except DataError:
        if refused:
            raise refused[0] from refused[0].__cause__
        raise
    trained_on = "train split" if share == 1.0 else f"{share:.3f} of the train split's documents"
    tokenizer.save(directory, trained_on=trained_on)


def _recording(texts: Iterable[str], refused: list[DataError]) -> Iterator[str]:
    """``texts``; what reading them raises is kept, because sentencepiece puts it into words of its own."""
    try:
        yield from texts
    except DataError as error:
        refused.append(error)
        raise


def _narrow(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """As int32, which holds every vocabulary; an id beyond stays outside of it, to be refused by name later."""
    limits = np.iinfo(np.int32)
    return np.clip(np.asarray(ids, dtype=np.int64), limits.min, limits.max).astype(np.int32)
