"""Text to token ids and back: a sentencepiece model whose hash is frozen into every corpus and checkpoint.

Models trained here are BPE with byte fallback and no normalisation at all, so that ``decode(encode(text)) == text`` for
every string (but U+2581, which sentencepiece itself uses for the space).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_slm.errors import DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
"""Ids of the control pieces of a tokenizer trained here; EOS ends every document."""

NUM_FIXED_PIECES = 4 + 1 + 256
"""Control pieces, the line break and the bytes: what a tokenizer trained here holds before the first character."""

LONGEST_LINE_CHARACTERS = 16_384
"""A longer line is cut before training: sentencepiece drops a sentence over ``max_sentence_length`` bytes unread."""


class Tokenizer:
    """A loaded sentencepiece model. Made by :meth:`open`."""

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{path} is not a sentencepiece model ({error}). Give the .model file.") from error
        self.path = path
        self.model = model
        self.hash = hashlib.sha256(model).hexdigest()
        if self._processor.eos_id() < 0:
            raise DataError(
                f"The tokenizer {path} has no end-of-sentence piece, which marks the end of a document. "
                "Train it with eos_id >= 0, or let `mslm data prepare` train one."
            )

    @staticmethod
    def open(model_path: str | Path, expected_hash: str | None = None) -> Tokenizer:
        """Load ``model_path``.

        Args:
            expected_hash: sha256 (hex) of the model file that the corpus or the checkpoint was made with.

        Raises:
            DataError: the file is missing, no sentencepiece model, or not the one expected.
        """
        path = Path(model_path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read the tokenizer {path}: {error.strerror}. Check the path.") from error
        found = hashlib.sha256(model).hexdigest()
        if expected_hash is not None and found != expected_hash:
            raise DataError(
                f"The tokenizer {path} has sha256 {found}, but the tokens were made with {expected_hash}: the same ids "
                "would mean other text. Use the tokenizer.model that lies in the corpus's tokenizer/ directory, or "
                "prepare the corpus again with this one."
            )
        return Tokenizer(model, path)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return int(self._processor.vocab_size())

    @property
    def eod_id(self) -> int:
        """Id of the piece that ends a document."""
        return int(self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without control pieces: a literal ``</s>`` in the text is encoded as ordinary characters."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """:meth:`encode` of several texts; the result does not depend on ``num_threads``."""
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=num_threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control pieces have none, and a cut UTF-8 sequence becomes U+FFFD."""
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id."""
        piece: str = self._processor.id_to_piece(int(token_id))
        return piece


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path) -> Tokenizer:
    """Train a BPE vocabulary on ``texts`` and write it to ``output``.

    The same texts in the same order give the same file, byte for byte.

    Raises:
        DataError: there is no text, or the text cannot fill ``vocab_size`` or needs more.
    """
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
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
    path = Path(output)
    path.write_bytes(writer.getvalue())
    return Tokenizer(writer.getvalue(), path)


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
