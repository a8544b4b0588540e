"""A sentencepiece model as :class:`megatron_slm.data.tokenizer.Tokenizer` uses it, and the training of one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_slm.errors import DataError

MODEL_TYPES = ("bpe", "unigram")

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
"""Ids of the control pieces of a tokenizer trained here; EOS ends every document."""

NUM_FIXED_PIECES = 4 + 1 + 256
"""Control pieces, the line break and the bytes: what a tokenizer trained here holds before the first character."""

LONGEST_LINE_CHARACTERS = 16_384
"""A longer line is cut before training: sentencepiece drops a sentence over ``max_sentence_length`` bytes unread."""


class SentencePieceModel:
    """A loaded ``tokenizer.model``.

    Raises:
        DataError: ``content`` is no sentencepiece model, or has no piece that ends a document.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, content: bytes, path: Path, eod_token: str | None) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a sentencepiece model ({error}). Give the .model file, or a tokenizer.json."
            ) from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eod_id = self._eod_id(path, eod_token)

    def _eod_id(self, path: Path, eod_token: str | None) -> int:
        if eod_token is None:
            eos = int(self._processor.eos_id())
            if eos < 0:
                raise DataError(
                    f"The tokenizer {path} has no end-of-sentence piece, which marks the end of a document. "
                    "Name a control piece with --eod-token, or let `mslm data prepare` train a tokenizer."
                )
            return eos
        token = int(self._processor.piece_to_id(eod_token))
        if not self._processor.is_control(token) or self.piece(token) != eod_token:
            control = [self.piece(other) for other in range(self.vocab_size) if self._processor.is_control(other)]
            raise DataError(
                f"--eod-token is {eod_token}, which is no control piece of {path}; "
                f"it has {', '.join(control) or 'none'}."
            )
        return token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=num_threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def piece(self, token_id: int) -> str:
        piece: str = self._processor.id_to_piece(token_id)
        return piece


def train_model(texts: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """A model with byte fallback and no normalisation, trained on ``texts``.

    Raises:
        DataError: there is no text, or the text cannot fill ``vocab_size`` or needs more.
    """
    if model_type not in MODEL_TYPES:
        raise DataError(f"The type of the tokenizer is {model_type}, but it must be one of {', '.join(MODEL_TYPES)}.")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=writer,
            model_type=model_type,
            # Below the fixed pieces sentencepiece does not come to say how many the text needs.
            vocab_size=max(vocab_size, NUM_FIXED_PIECES),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # Without the dummy prefix, decoding any window of a document loses no leading space.
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            max_sentence_length=4 * LONGEST_LINE_CHARACTERS,
            # One thread, because the number is stored in the model file and would change its hash.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_refused(str(error), vocab_size)) from error
    return writer.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # sentencepiece refuses NUL in its training text; byte fallback still encodes it.
            line = line.replace("\0", " ")
            for start in range(0, len(line), LONGEST_LINE_CHARACTERS):
                yield line[start : start + LONGEST_LINE_CHARACTERS]


def _training_refused(message: str, vocab_size: int) -> str:
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"The training text is too small for a vocabulary of {vocab_size}: the largest possible --vocab-size "
            f"is {match.group(1)}. Lower --vocab-size to that or less, or give more text."
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: the control pieces, the 256 bytes and the characters of the text "
            f"alone need {match.group(1)}. Raise --vocab-size to that or more."
        )
    if "sentences_.empty()" in message:
        return "There is no text to train a tokenizer on: every document of the train split is empty. Give more text."
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {message}"
