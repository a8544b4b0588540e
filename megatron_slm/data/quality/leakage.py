"""Training documents that hold pieces of evaluation texts.

As in Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: a document leaks when it shares an n-gram
of 13 words, in lower case and without punctuation, with an evaluation text; a shorter evaluation text is one n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.data.documents import open_sources, read_documents
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.words import ngrams, words
from megatron_slm.errors import DataError

FEWEST_WORDS = 4
"""Shorter evaluation texts ("Yes.") are no evidence, would remove most of a corpus, and are not looked for."""

KEY_OPTION = "--decontaminate-key"


@dataclass(frozen=True)
class Leak:
    """One n-gram that a document shares with an evaluation file.

    Attributes:
        file: as the evaluation file is named in reasons.
        eval_document: number of the evaluation text in its file, from 0, empty ones not counted.
        ngram: the shared words.
        share: part of the document's words that lies in n-grams shared with the file.
    """

    file: str
    eval_document: int
    ngram: str
    share: float


@dataclass(frozen=True)
class _Place:
    file: int
    document: int


class LeakageIndex:
    """All n-grams of the evaluation files. Made by :meth:`of`.

    Memory: about 250 bytes a word of the evaluation files.
    """

    def __init__(self, ngram: int, share: float) -> None:
        self.files: list[str] = []
        self._ngram, self._share = ngram, share
        self._head = min(FEWEST_WORDS, ngram)
        self._places: dict[str, tuple[_Place, ...]] = {}
        # Whole short texts, under their first words, so that a document is probed twice a word, whatever their lengths.
        self._short: dict[str, dict[tuple[str, ...], tuple[_Place, ...]]] = {}

    @staticmethod
    def of(config: QualityConfig) -> LeakageIndex:
        """Read the evaluation files of ``config``.

        Raises:
            DataError: a file cannot be read, or holds nothing that can be looked for.
        """
        index = LeakageIndex(config.leakage_ngram, config.leakage_share)
        for name, path in config.eval_files().items():
            index._read(name, Path(path), config.leakage_text_key)
        return index

    def find(self, text: str) -> tuple[Leak, ...]:
        """The first n-gram that ``text`` shares with each file, for the files with which it shares too much."""
        sequence = words(text)
        covered: dict[int, list[tuple[int, int]]] = {}
        first: dict[int, tuple[_Place, int, int]] = {}
        for start, length, place in self._shared(sequence):
            first.setdefault(place.file, (place, start, length))
            covered.setdefault(place.file, []).append((start, length))
        leaks = []
        for file, (place, start, length) in sorted(first.items()):
            share = _union(covered[file]) / len(sequence)
            if share > self._share:
                ngram = " ".join(sequence[start : start + length])
                leaks.append(Leak(self.files[file], place.document, ngram, round(share, 4)))
        return tuple(leaks)

    def _shared(self, sequence: list[str]) -> Iterator[tuple[int, int, _Place]]:
        """(first word, words, place) of every shared n-gram, by first word."""
        for start in range(len(sequence) - self._head + 1):
            if start + self._ngram <= len(sequence):
                for place in self._places.get(" ".join(sequence[start : start + self._ngram]), ()):
                    yield start, self._ngram, place
            candidates = self._short.get(" ".join(sequence[start : start + self._head]), {})
            for whole, places in candidates.items():
                if tuple(sequence[start : start + len(whole)]) == whole:
                    yield from ((start, len(whole), place) for place in places)

    def add(self, name: str, texts: Iterable[str]) -> bool:
        """Look for the texts of one more evaluation file; returns whether one of them is long enough."""
        wanted = False
        for document, text in enumerate(texts):
            sequence, place = words(text), _Place(len(self.files), document)
            if len(sequence) < self._head:
                continue
            wanted = True
            if len(sequence) < self._ngram:
                short = self._short.setdefault(" ".join(sequence[: self._head]), {})
                _note(short, tuple(sequence), place)
            else:
                for ngram in ngrams(sequence, self._ngram):
                    _note(self._places, ngram, place)
        self.files.append(name)
        return wanted

    def _read(self, name: str, path: Path, text_key: str) -> None:
        (source,) = open_sources([path])
        texts = read_documents(source, text_key=text_key, text_unit="paragraph", key_option=KEY_OPTION)
        if not self.add(name, texts):
            raise DataError(
                f"The evaluation file {path} holds no text of {self._head} words or more, so nothing can be looked "
                f"for. Name the right file, or the right key with {KEY_OPTION}."
            )


def _note(places: dict[Any, tuple[_Place, ...]], ngram: Any, place: _Place) -> None:
    """Remember the first place of ``ngram`` in each file."""
    known = places.get(ngram, ())
    if all(other.file != place.file for other in known):
        places[ngram] = (*known, place)


def _union(spans: list[tuple[int, int]]) -> int:
    """Words inside any of the spans (first word, words), which are in order of their first words."""
    total = end = 0
    for start, length in spans:
        total += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return total
