"""Files to documents, and documents to splits.

A ``.jsonl`` file holds one document a line, ``{"text": ...}``. A ``.txt`` file holds, by default, one document per
*paragraph*: blocks of lines separated by one or more blank lines; with ``text_unit="file"`` the whole file is one.
Documents are numbered from 0 over all inputs in the order given; empty ones are skipped and take no number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.shards import file_sha256
from megatron_slm.errors import DataError

TEXT_UNITS = ("paragraph", "file")


@dataclass(frozen=True)
class Source:
    """One input file as it was read."""

    path: Path
    sha256: str
    num_bytes: int

    @staticmethod
    def of(path: Path) -> Source:
        """Hash ``path``.

        Raises:
            DataError: the file cannot be read, or is of a kind that has no reader.
        """
        if path.suffix not in (".txt", ".jsonl"):
            raise DataError(f"Cannot read documents from {path}: the name must end in .txt or .jsonl.")
        try:
            return Source(path, file_sha256(path), path.stat().st_size)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def read_documents(sources: Sequence[Source], *, text_key: str, text_unit: str) -> Iterator[str]:
    """All documents that are not empty, in order.

    Raises:
        DataError: a file is not UTF-8, or a line of a ``.jsonl`` file is not an object with a string in ``text_key``;
            the message names the file and the line.
    """
    for source in sources:
        try:
            if source.path.suffix == ".jsonl":
                texts = _read_jsonl(source.path, text_key)
            else:
                texts = _read_text(source.path, text_unit)
            yield from (text for text in texts if text.strip())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source.path} is not UTF-8 ({error.reason}). Convert it, for example with iconv."
            ) from error


def in_valid(seed: int, document: int, split: float) -> bool:
    """Whether document number ``document`` belongs to the valid split: a keyed hash of the number is below ``split``.

    The answer for one document does not depend on how many there are, so text may be appended later.
    """
    return _fraction(f"split {seed} {document}") < split


def in_tokenizer_sample(seed: int, document: int, share: float) -> bool:
    """Whether the tokenizer is trained on the document, when it needs only a ``share`` of the train split."""
    return _fraction(f"tokenizer {seed} {document}") < share


def _fraction(message: str) -> float:
    """A number in [0, 1), uniform over messages, the same on every machine."""
    digest = hashlib.blake2b(message.encode(), digest_size=8, person=b"mslm documents").digest()
    # 53 bits are what a double holds exactly.
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number} is not JSON ({error.msg}, column {error.colno}). Mend the line."
                ) from error
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = f"its keys are {sorted(record)}" if isinstance(record, dict) else "it is no object"
                raise DataError(
                    f'{path}:{number} has no string under "{text_key}"; {keys}. Name the right key with --text-key.'
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{path}:{number} holds half of a surrogate pair, which is no text. Mend the line."
                ) from error
            yield text


def _read_text(path: Path, text_unit: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if text_unit == "file":
            yield file.read()
            return
        block: list[str] = []
        for line in file:
            if line.strip():
                block.append(line)
            elif block:
                yield "".join(block).removesuffix("\n")
                block = []
        if block:
            yield "".join(block).removesuffix("\n")
