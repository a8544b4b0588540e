"""Rendered text to ids: the special tokens that a template writes are those tokens, not their spelling."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.data.tokenizer_sentencepiece import SentencePieceModel


class EncodedText(NamedTuple):
    """Ids of a text, and the character that each begins at (roughly: a space before it may be left out)."""

    ids: list[int]
    starts: np.ndarray


class TemplateTokenizer:
    """A tokenizer that reads special tokens; :class:`Tokenizer` itself takes every text literally.

    Attributes:
        special: ids of special tokens by spelling.
        joins: whether the ids of a text are those of its parts, one after another, wherever it is cut between words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._model: Any
        self._pieces = tokenizer.kind == SentencePieceModel.kind
        self.special: dict[str, int]
        if self._pieces:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
            ids = range(tokenizer.vocab_size)
            self.special = {tokenizer.piece(token): token for token in ids if self._model.is_control(token)}
            self._sizes = np.array([self._num_bytes(token) for token in ids], dtype=np.int64)
        else:
            import tokenizers

            self._model = tokenizers.Tokenizer.from_str(tokenizer.model.decode("utf-8"))
            self._model.no_truncation()
            self._model.no_padding()
            self._model.encode_special_tokens = False
            added = self._model.get_added_tokens_decoder()
            self.special = {token.content: number for number, token in added.items() if token.special}
        spelled = sorted(self.special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or "(?!)")
        self.special_ids = frozenset(self.special.values())
        self.joins = tokenizer.decode(tokenizer.encode("x") + tokenizer.encode("y")) == "xy"

    def _num_bytes(self, token: int) -> int:
        """Bytes of text that a sentencepiece piece stands for."""
        return 1 if self._model.is_byte(token) else len(self.tokenizer.piece(token).replace("\u2581", " ").encode())

    def __reduce__(self) -> tuple[type[TemplateTokenizer], tuple[Tokenizer]]:
        return TemplateTokenizer, (self.tokenizer,)

    @property
    def path(self) -> Path:
        """Of the tokenizer's file."""
        return self.tokenizer.path

    def special_in(self, text: str) -> str | None:
        """The first special token that ``text`` spells."""
        found = self._spelled.search(text)
        return found.group() if found else None

    def last_special_end(self, text: str) -> int:
        """Where the last special token in ``text`` ends; 0 when there is none."""
        return max((match.end() for match in self._spelled.finditer(text)), default=0)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; nothing is added at its ends."""
        if not self._pieces:
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
            return ids
        found = (self._ids(part) if special is None else [special] for part, special in self._parts(text))
        return list(itertools.chain.from_iterable(found))

    def encode_placed(self, text: str) -> EncodedText:
        """Ids of ``text`` with their places."""
        if not self._pieces:
            encoding = self._model.encode(text, add_special_tokens=False)
            return EncodedText(encoding.ids, np.array([start for start, _ in encoding.offsets], dtype=np.int64))
        ids: list[int] = []
        starts: list[np.ndarray] = []
        at = 0
        for part, special in self._parts(text):
            found = self._ids(part) if special is None else [special]
            starts.append(at + (self._starts(found, part) if special is None else np.zeros(1, np.int64)))
            ids += found
            at += len(part)
        return EncodedText(ids, np.concatenate([np.empty(0, np.int64), *starts]))

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """``text`` cut at special tokens: (part, its id, or None where it is text)."""
        at = 0
        for match in self._spelled.finditer(text):
            if at < match.start():
                yield text[at : match.start()], None
            yield match.group(), self.special[match.group()]
            at = match.end()
        if at < len(text):
            yield text[at:], None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def _starts(self, ids: list[int], text: str) -> np.ndarray:
        """The character that each piece begins at, by the bytes that pieces stand for; past the end where those are not
        the text's, as after a normalisation.
        """
        sizes = self._sizes[ids]
        added = int(sizes.sum()) - len(text.encode())
        if added not in (0, 1):  # 1: a space before the text
            return np.full(len(ids), len(text))
        begins = np.maximum(np.cumsum(sizes) - sizes - added, 0)
        if text.isascii():
            return begins
        ends = np.cumsum([len(character.encode()) for character in text])
        return np.searchsorted(ends, begins, side="right")
