"""Text to token ids and back: a tokenizer file whose hash is frozen into every corpus and checkpoint.

Models trained here are sentencepiece BPE or unigram with byte fallback and no normalisation at all, so that
``decode(encode(text)) == text`` for every string (but U+2581, which sentencepiece itself uses for the space). What a
Hugging Face ``tokenizer.json`` keeps of a text is its own affair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.data.shards import write_json
from megatron_slm.data.tokenizer_huggingface import HuggingFaceModel
from megatron_slm.data.tokenizer_sentencepiece import SentencePieceModel, train_model
from megatron_slm.errors import DataError

FACTS_NAME = "facts.json"
"""Beside a tokenizer file that was saved here: what it is, and which token ends a document."""

FILE_NAMES = (SentencePieceModel.file_name, HuggingFaceModel.file_name)

COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
"""What a Hugging Face model has beside its tokenizer's file. Nothing of it is read here: it travels with the file."""

COMPANIONS_FOLDER = "huggingface"
"""Where they lie beside a file that was saved here: a second tokenizer of the same text must not be taken for it."""


class Model(Protocol):
    """What both kinds of tokenizer can do; :class:`Tokenizer` says what the methods mean."""

    kind: str
    file_name: str
    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token_id: int) -> str: ...


class Tokenizer:
    """A loaded tokenizer. Made by :meth:`open`; a copy for another process is made by pickle.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file_name: the name the file goes by: ``tokenizer.model`` or ``tokenizer.json``.
        model: content of the file.
        hash: sha256 (hex) of the file.
        vocab_size: every id is below it, those of added tokens included.
        eod_id: id of the token that ends a document. No text is encoded to it.
        eod_token: its name, when it was asked for by name.
    """

    def __init__(self, model: bytes, path: Path, eod_token: str | None = None) -> None:
        if not model:
            raise DataError(f"The tokenizer {path} is empty (0 bytes). Copy it anew.")
        loaded = HuggingFaceModel if model.lstrip()[:1] == b"{" else SentencePieceModel
        self._model: Model = loaded(model, path, eod_token)
        self.path = path
        self.model = model
        self.hash = hashlib.sha256(model).hexdigest()
        self.kind, self.file_name = self._model.kind, self._model.file_name
        self.vocab_size, self.eod_id, self.eod_token = self._model.vocab_size, self._model.eod_id, eod_token

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, Path, str | None]]:
        # The package tokenizers forgets in a pickle that special tokens in text are text.
        return Tokenizer, (self.model, self.path, self.eod_token)

    @staticmethod
    def open(path: str | Path, expected_hash: str | None = None, eod_token: str | None = None) -> Tokenizer:
        """Load a sentencepiece model or a Hugging Face ``tokenizer.json``, told apart by their content.

        Args:
            path: the file, or a directory that holds it (:func:`find_tokenizer`).
            expected_hash: sha256 (hex) of the file that the corpus or the checkpoint was made with.
            eod_token: control piece or special token that ends a document; default the one that was named when the
                file was saved here, else the sentencepiece model's own or a well-known one.

        Raises:
            DataError: the file is missing, no tokenizer, or not the one expected, or has no such token.
        """
        path = Path(path)
        if path.is_dir():
            path = find_tokenizer(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read the tokenizer {path}: {error.strerror}. Check the path.") from error
        found = hashlib.sha256(model).hexdigest()
        if expected_hash is not None and found != expected_hash:
            raise DataError(
                f"The tokenizer {path} has sha256 {found}, but the tokens were made with {expected_hash}: the same ids "
                "would mean other text. Use the file that lies in the corpus's tokenizer/ directory, or prepare the "
                "corpus again with this one."
            )
        return Tokenizer(model, path, _saved_eod_token(path) if eod_token is None else eod_token)

    def save(self, directory: Path, **facts: Any) -> Tokenizer:
        """Write the file into ``directory``, with a ``facts.json`` and its companions beside it; returns the copy.

        Args:
            facts: more to say in ``facts.json``.
        """
        directory.mkdir(exist_ok=True)
        path = directory / self.file_name
        path.write_bytes(self.model)
        for companion in self.companions():
            (directory / COMPANIONS_FOLDER).mkdir(exist_ok=True)
            (directory / COMPANIONS_FOLDER / companion.name).write_bytes(companion.read_bytes())
        known = {"kind": self.kind, "vocab_size": self.vocab_size, "eod_id": self.eod_id, "eod_token": self.eod_token}
        write_json(directory / FACTS_NAME, {**known, "sha256": self.hash, **facts})
        return Tokenizer(self.model, path, self.eod_token)

    def companions(self) -> list[Path]:
        """Files that a Hugging Face model has beside this one."""
        if self.path.name != self.file_name:
            return []
        folder = self.path.with_name(COMPANIONS_FOLDER)
        near = folder if folder.is_dir() else self.path.parent
        return [near / name for name in COMPANIONS if name != self.file_name and (near / name).is_file()]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without control pieces: a literal ``</s>`` in the text is encoded as ordinary characters."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """:meth:`encode` of several texts; the result does not depend on ``num_threads``.

        Args:
            num_threads: for Hugging Face's only whether it is more than 1: ``RAYON_NUM_THREADS`` sets how many.
        """
        return self._model.encode_batch(texts, num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control pieces have none, and a cut UTF-8 sequence becomes U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id; empty where a vocabulary has a gap."""
        return self._model.piece(int(token_id))


def find_tokenizer(directory: str | Path) -> Path:
    """The tokenizer file in ``directory``: ``tokenizer.model``, or else ``tokenizer.json``.

    Raises:
        DataError: there is neither.
    """
    for name in FILE_NAMES:
        if (path := Path(directory, name)).is_file():
            return path
    raise DataError(f"{directory} holds no tokenizer: there is neither {' nor '.join(FILE_NAMES)}. Check the path.")


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path, *, model_type: str = "bpe") -> Tokenizer:
    """Train a sentencepiece vocabulary on ``texts`` and write it to ``output``.

    The same texts in the same order give the same file, byte for byte.

    Args:
        model_type: "bpe" or "unigram".

    Raises:
        DataError: there is no text, or the text cannot fill ``vocab_size`` or needs more.
    """
    model, path = train_model(texts, vocab_size, model_type), Path(output)
    path.write_bytes(model)
    return Tokenizer(model, path)


def _saved_eod_token(path: Path) -> str | None:
    facts_path = path.with_name(FACTS_NAME)
    if not facts_path.exists():
        return None
    try:
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{facts_path} is damaged ({error}). Copy the tokenizer's directory anew.") from error
    eod_token = facts.get("eod_token") if isinstance(facts, dict) else None
    return None if eod_token is None else str(eod_token)
