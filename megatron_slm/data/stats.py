"""What a prepared split looks like in numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

READ_TOKENS = 1 << 22
"""Tokens looked at together: what is in memory does not grow with the corpus."""

NUM_FREQUENT = 20
BAR_CHARACTERS = 40
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
"""How sentencepiece spells the pieces of byte fallback."""


@dataclass(frozen=True)
class Counts:
    """One pass over a split.

    Attributes:
        pieces: [vocabulary] occurrences of each id.
        lengths: [documents] tokens, the one that ends the document not counted.
    """

    pieces: np.ndarray
    lengths: np.ndarray


def describe(data_path: str | Path, split: str) -> str:
    """Documents, tokens, lengths, vocabulary and most frequent pieces of a prepared split, as text.

    Raises:
        DataError: there is no such corpus or split, its tokenizer is another, or it (up to 4 GiB) is damaged.
    """
    manifest = read_manifest(data_path)
    corpus = Corpus.open(Path(data_path, split))
    if corpus.num_bytes <= HASH_LIMIT_BYTES:
        corpus = Corpus.open(Path(data_path, split), verify="hash")
    tokenizer = Tokenizer.open(Path(data_path, "tokenizer"), corpus.tokenizer_hash)
    counts = count(corpus)
    num_characters = manifest["splits"][split]["num_characters"]
    lines = [
        f"{split} of {data_path}",
        f"{'documents':<24}{corpus.num_documents:>16,}",
        f"{'tokens':<24}{corpus.num_tokens:>16,}   an end of document after each document included",
        *_characters(corpus.num_tokens - corpus.num_documents, num_characters),
        *_vocabulary(counts, tokenizer),
        "",
        "document lengths, in tokens",
        *_lengths(counts.lengths),
        "",
        *_histogram(counts.lengths),
        "",
        f"most frequent pieces of {int(counts.pieces.sum()):,}, ends of documents not counted",
        *_frequent(counts.pieces, tokenizer),
    ]
    return "\n".join(lines)


def count(corpus: Corpus) -> Counts:
    """Read every token of ``corpus`` once.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    pieces = np.zeros(corpus.vocab_size, dtype=np.int64)
    ends: list[np.ndarray] = []
    for start in range(0, corpus.num_tokens, READ_TOKENS):
        tokens = corpus.tokens(start, min(start + READ_TOKENS, corpus.num_tokens))
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= corpus.vocab_size:
            raise DataError(
                f"{corpus.directory} is damaged: its ids are {lowest}..{highest}, but its vocabulary has "
                f"{corpus.vocab_size} pieces. Copy the corpus anew."
            )
        pieces += np.bincount(tokens, minlength=corpus.vocab_size)
        ends.append(np.flatnonzero(tokens == corpus.eod_id) + start)
    pieces[corpus.eod_id] = 0
    places = np.concatenate([np.array([-1]), *ends])
    return Counts(pieces, np.diff(places) - 1)


def _characters(num_tokens: int, num_characters: int) -> Iterator[str]:
    if not num_characters:
        yield f"{'characters':<24}{'not known':>16}   the input held token ids"
        return
    yield f"{'characters':<24}{num_characters:>16,}"
    yield f"{'tokens a character':<24}{num_tokens / num_characters:>16.4f}"


def _vocabulary(counts: Counts, tokenizer: Tokenizer) -> Iterator[str]:
    total = max(1, int(counts.pieces.sum()))
    used = int(np.count_nonzero(counts.pieces))
    byte_pieces = [token for token in range(len(counts.pieces)) if BYTE_PIECE.fullmatch(tokenizer.piece(token))]
    fallback = int(counts.pieces[byte_pieces].sum())
    yield f"{'vocabulary':<24}{len(counts.pieces):>16,}   {used:,} pieces occur ({used / len(counts.pieces):.1%})"
    if byte_pieces:
        yield f"{'byte-fallback pieces':<24}{fallback:>16,}   {fallback / total:.3%} of the pieces"
    else:
        yield f"{'byte-fallback pieces':<24}{'none':>16}   this vocabulary has no such pieces"


def _lengths(lengths: np.ndarray) -> Iterator[str]:
    names = ("min", "25%", "median", "75%", "99%", "max")
    values = np.percentile(lengths, (0, 25, 50, 75, 99, 100)) if len(lengths) else np.zeros(len(names))
    yield "".join(f"{name:>12}" for name in (*names, "mean"))
    yield "".join(f"{value:>12,.0f}" for value in (*values, lengths.mean() if len(lengths) else 0))


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """One line for each power of two, from the shortest to the longest document."""
    if not len(lengths):
        return
    # The number of bits: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7 ...
    bits = np.frexp(lengths)[1]
    counts = np.bincount(bits)
    for power in range(int(bits.min()), len(counts)):
        low, high = (1 << power) >> 1, max(0, (1 << power) - 1)
        bar = "#" * -(-BAR_CHARACTERS * int(counts[power]) // int(counts.max()))
        yield f"{low:>12,} ..{high:>12,}{int(counts[power]):>12,} {bar}".rstrip()


def _frequent(pieces: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    total = max(1, int(pieces.sum()))
    # Among equals the lower id is first.
    for token in np.argsort(-pieces, kind="stable")[:NUM_FREQUENT].tolist():
        if pieces[token]:
            yield f"{int(pieces[token]):>16,}{pieces[token] / total:>9.2%}  {token:>7}  {tokenizer.piece(token)!r}"
