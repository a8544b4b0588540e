"""The documents of all inputs, numbered and cut into chunks: always the same for the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_slm.data.documents import Source, read_documents, read_token_documents
from megatron_slm.data.quality.personal import scrub

CHUNK_CHARACTERS = 1 << 20
CHUNK_DOCUMENTS = 4096
"""A chunk ends with the document that reaches either: a fraction of a second of work, and what a kill may cost."""

Document = str | np.ndarray
"""Text, or [n] token ids of an input that holds tokens."""


@dataclass
class Chunk:
    """Some documents that follow each other."""

    number: int
    first: int
    """Number of its first document over all inputs."""
    documents: list[Document] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    """Place of each document's input among the sources."""

    @property
    def numbers(self) -> range:
        """The documents' numbers over all inputs."""
        return range(self.first, self.first + len(self.documents))


def as_it_is(text: str) -> str:
    """A text that nothing is scrubbed from."""
    return text


def scrubbed(text: str) -> str:
    """A text without what looks like personal data."""
    return scrub(text)[0]


@dataclass(frozen=True)
class Reader:
    """The inputs of one command, to be read as often as there are passes."""

    sources: tuple[Source, ...]
    text_key: str
    text_unit: str
    pattern: str
    """Which files of a directory were taken as sources."""
    eod_id: int | None = None
    """Of the given tokenizer; inputs that hold tokens are read with one alone."""
    scrub: Callable[[str], str] = as_it_is
    """Picklable: what is tokenised of a text."""

    def documents(self) -> Iterator[tuple[int, Document]]:
        """(place of the source, document) of each document that is not empty.

        Raises:
            DataError: an input cannot be read or understood.
        """
        for place, source in enumerate(self.sources):
            for document in self._documents_of(source):
                yield place, document

    def chunks(self) -> Iterator[Chunk]:
        """All documents, in chunks."""
        chunk, size = Chunk(0, 0), 0
        for place, document in self.documents():
            chunk.documents.append(document)
            chunk.sources.append(place)
            size += len(document)
            if size >= CHUNK_CHARACTERS or len(chunk.documents) == CHUNK_DOCUMENTS:
                yield chunk
                chunk, size = Chunk(chunk.number + 1, chunk.numbers.stop), 0
        if chunk.documents:
            yield chunk

    def _documents_of(self, source: Source) -> Iterator[Document]:
        if source.kind != "tokens":
            return read_documents(source, text_key=self.text_key, text_unit=self.text_unit)
        assert self.eod_id is not None, "prepare() refuses tokens without a tokenizer"
        return read_token_documents(source, self.eod_id)


def chunking() -> dict[str, int]:
    """What decides where one chunk ends."""
    return {"characters": CHUNK_CHARACTERS, "documents": CHUNK_DOCUMENTS}
