"""Held-out items from what a run is trained on: the valid split of compiled examples, or of a corpus of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.examples.document import Document
from megatron_slm.data.examples.store import ExampleStore, holds_examples
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError
from megatron_slm.evaluate.items import Item, Task, digest_of, windows


def compiled_task(directory: Path, tokenizer: Tokenizer, *, window: int, limit: int) -> Task:
    """The first ``limit`` documents of ``directory / "valid"``, each an item in windows of ``window`` labels.

    Raises:
        DataError: there is no such split, it is of another tokenizer, holds no text to predict, or nothing.
    """
    split = directory / "valid"
    store = ExampleStore.open(split) if holds_examples(split) else Corpus.open(split)
    if store.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{directory} was made with the tokenizer {store.tokenizer_hash}, the model with {tokenizer.hash}: the "
            "same ids mean other text. Give the data that the model was made for."
        )
    items = _of_examples(store, window, limit) if isinstance(store, ExampleStore) else _of_text(store, window, limit)
    if not items:
        raise DataError(f"{split} holds no document. Prepare it again with a larger share for validation.")
    sized = tuple(
        Item(one.id, one.documents, (sum(_num_bytes(tokenizer, each) for each in one.documents),), fields=one.fields)
        for one in items
    )
    digest = digest_of([document for one in sized for document in one.documents])
    return Task(directory.name, "held_out", sized, digest)


def _of_examples(store: ExampleStore, window: int, limit: int) -> list[Item]:
    if store.kind != "chat":
        raise DataError(
            f"{store.directory} holds {store.kind} examples, whose text has no loss of its own; give chats."
        )
    items = []
    for number in range(min(limit, store.num_documents)):
        counted = Document(store.tokens(number).astype(np.int64), (store.weights(number) != 0).astype(np.float32))
        source = store.sources[int(store.source[number])]
        items.append(Item(str(number), tuple(_cut(counted, window)), fields={"source": source}))
    return items


def _of_text(corpus: Corpus, window: int, limit: int) -> list[Item]:
    """Documents with the token that ends them, each predicted from the end of the one before."""
    tokens = corpus.tokens(0, corpus.num_tokens)
    ends = np.flatnonzero(tokens == corpus.eod_id)[:limit]
    starts = np.concatenate([[-1], ends[:-1]])
    return [
        Item(
            str(number), tuple(windows(np.append(corpus.eod_id, tokens[start + 1 : end + 1]).astype(np.int64), window))
        )
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]


def _cut(document: Document, window: int) -> list[Document]:
    """Windows of a document, in which what counts is what counted."""
    places = windows(np.arange(len(document.tokens)), window)
    return [Document(document.tokens[one.tokens], document.weights[one.tokens] * one.weights) for one in places]


def _num_bytes(tokenizer: Tokenizer, document: Document) -> int:
    """Bytes of what counts; the tokens alone are decoded, so a space before them may be missing."""
    counted = document.tokens[1:][document.weights[1:] != 0]
    return len(tokenizer.decode(counted[counted != tokenizer.eod_id].tolist()).encode())
