"""Files to documents, and documents to splits.

``.jsonl``
    one document a line, ``{"text": ...}``
``.txt``
    one document per *paragraph*: blocks of lines separated by one or more blank lines; with ``text_unit="file"`` the
    whole file is one
``.parquet``
    one document a row of the column named by ``text_key``
a directory
    a source tree: every file that matches a pattern is one document, in the order of their paths; hidden files and
    directories, packages installed inside it (:data:`INSTALLED`) and prepared corpora are passed over, files that are
    not UTF-8 are counted as skipped
``PREFIX.bin`` and ``PREFIX.idx``
    Megatron's token ids; either file, or PREFIX, names both (:mod:`megatron_slm.data.indexed`)

``.jsonl`` and ``.txt`` may be compressed: ``.gz``, ``.zst``. Documents are numbered from 0 over all inputs in the order
given; empty ones are skipped and take no number.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_slm.data import indexed
from megatron_slm.data.manifest import MANIFEST_NAME
from megatron_slm.data.readers import CODECS, open_bytes, read_jsonl, read_parquet, read_text, require_regular
from megatron_slm.data.shards import INDEX_NAME, file_sha256
from megatron_slm.errors import DataError

TEXT_UNITS = ("paragraph", "file")
DEFAULT_PATTERN = "**/*.py"

KINDS = {".jsonl": "jsonl", ".txt": "text", ".parquet": "parquet"}
KNOWN_NAMES = ".jsonl, .txt (each also with .gz or .zst), .parquet, or .bin and .idx"

INSTALLED = ("site-packages", "dist-packages")
"""Directories inside a tree whose files are not of it: what lies in Python's own differs between machines."""

HEAD_BYTES = 4096
"""A licence line is looked for in so much of a file's beginning."""

SPDX = re.compile(
    rb"^\W*SPDX-License-Identifier:[ \t]*([(A-Za-z0-9][A-Za-z0-9.+() -]*?)[ \t]*(?:\*/|-->|\"\"\"|''')?\r?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class SourceFile:
    """One file as it was when it was hashed."""

    path: Path
    sha256: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """One input as it was when it was hashed. Made by :func:`open_sources`."""

    path: Path
    kind: str
    """"jsonl", "text", "parquet", "tree" or "tokens"."""
    sha256: str
    """Of the file; of several files: of their paths inside the input and their hashes."""
    num_bytes: int
    licence: str | None
    """What the ``SPDX-License-Identifier:`` at the head of the text says, if it says something. Of a tree: all of its
    files' licences, when each of them that is not empty names one."""
    files: tuple[SourceFile, ...]
    num_skipped: int = 0
    """Files of a tree that match the pattern but are not UTF-8."""


def open_sources(inputs: Sequence[str | Path], *, pattern: str = DEFAULT_PATTERN) -> list[Source]:
    """One source an input, every file of it hashed.

    Args:
        pattern: which files of a directory are read, as :meth:`pathlib.Path.glob` understands it.

    Raises:
        DataError: an input cannot be read, is empty, or is of a kind that has no reader.
    """
    return [_open_source(Path(path), pattern) for path in inputs]


def read_documents(source: Source, *, text_key: str, text_unit: str, key_option: str = "--text-key") -> Iterator[str]:
    """The documents of ``source`` that are not empty, in order.

    Args:
        key_option: the option that sets ``text_key``, for refusals.

    Raises:
        DataError: the source cannot be read or understood; the message names the file and the place. A file that is not
            the one that was hashed is refused at its end, after its last document.
    """
    if source.kind == "tokens":
        raise DataError(
            f"{source.path} holds token ids, not text. Give the tokenizer they were made with, and no other input."
        )
    for file in source.files:
        with unchanged(file):
            if source.kind == "jsonl":
                texts = read_jsonl(file.path, text_key, key_option)
            elif source.kind == "parquet":
                texts = read_parquet(file.path, text_key, key_option)
            else:
                texts = read_text(file.path, "file" if source.kind == "tree" else text_unit)
            yield from (text for text in texts if text.strip())


def read_token_documents(source: Source, eod_id: int) -> Iterator[np.ndarray]:
    """The documents of a source of kind "tokens", each [n] ids without its end-of-document token; none is empty.

    Raises:
        DataError: the files are damaged, or not the ones that were hashed.
    """
    with contextlib.ExitStack() as stack:
        for file in source.files:
            stack.enter_context(unchanged(file))
        for document in indexed.read(source.path):
            ids = document[:-1] if len(document) and document[-1] == eod_id else document
            if len(ids):
                yield ids


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


def _open_source(path: Path, pattern: str) -> Source:
    with _readable(path):
        if path.is_dir():
            return _open_tree(path, pattern)
        if (prefix := indexed.prefix_of(path)) is not None:
            files = tuple(_hash_file(file) for file in indexed.files_of(prefix))
            return _joined(prefix, "tokens", files, None)
        kind = _kind_of(path)
        if kind is None:
            raise DataError(f"Cannot read documents from {path}: the name must end in {KNOWN_NAMES}.")
        file = _hash_file(path)
        if not file.num_bytes:
            raise DataError(f"{path} is empty (0 bytes). Give a file with text, or leave this one out.")
        licence = _licence_in(_head(path)) if kind == "text" else None
        return Source(path, kind, file.sha256, file.num_bytes, licence, (file,))


def _kind_of(path: Path) -> str | None:
    """Of ``name.KIND`` and ``name.KIND.gz``; only lines of text are streams that may be compressed as a whole."""
    if path.suffix.lower() in CODECS:
        kind = KINDS.get(path.with_suffix("").suffix.lower())
        return None if kind == "parquet" else kind
    return KINDS.get(path.suffix.lower())


def _open_tree(root: Path, pattern: str) -> Source:
    try:
        found = [path for path in root.glob(pattern) if path.is_file() and not _is_passed_over(path, root)]
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"--pattern is {pattern}, which is no pattern inside a directory: {error}.") from error
    files: list[SourceFile] = []
    licences: list[str | None] = []
    num_skipped = 0
    for path in sorted(found, key=lambda path: path.relative_to(root).parts):
        if (kind := _kind_of(path)) not in (None, "text") or path.suffix.lower() in CODECS:
            raise DataError(
                f"{path} matches the pattern {pattern}, but each file of a directory is read as one plain text. "
                f"Name such files ({kind or 'compressed'}) themselves, or change --pattern."
            )
        with _readable(path):
            if not _is_utf8(path):
                num_skipped += 1
                continue
            files.append(_hash_file(path))
            if files[-1].num_bytes:
                licences.append(_licence_in(_head(path)))
    if not any(file.num_bytes for file in files):
        raise DataError(
            f"No file in {root} with text in UTF-8 matches the pattern {pattern} "
            f"({len(found)} match). Name another directory, or change --pattern."
        )
    licence = _together(licences)
    return replace(_joined(root, "tree", tuple(files), licence), num_skipped=num_skipped)


def _together(licences: Sequence[str | None]) -> str | None:
    """The licence of a work that joins parts under ``licences``; none where one part has none."""
    named = {f"({name})" if " " in name else name for name in licences if name}
    return None if None in licences else " AND ".join(sorted(named))


def _is_passed_over(path: Path, root: Path) -> bool:
    inside = path.relative_to(root)
    if any(part.startswith(".") or part in INSTALLED for part in inside.parts):
        return True
    # All directories between the file and the root, which may be a corpus itself.
    return any(_is_corpus(root / parent) for parent in inside.parents if parent != Path())


def _is_corpus(directory: Path) -> bool:
    return (directory / MANIFEST_NAME).is_file() and (directory / "train" / INDEX_NAME).is_file()


def _joined(path: Path, kind: str, files: tuple[SourceFile, ...], licence: str | None) -> Source:
    base = path if kind == "tree" else path.parent
    digest = hashlib.sha256()
    for file in files:
        # The prefix of Megatron's files is a name like any other; what they hold does not depend on it.
        name = file.path.relative_to(base).as_posix() if kind == "tree" else file.path.suffix
        digest.update(f"{file.sha256}  {name}\n".encode("utf-8", "surrogateescape"))
    return Source(path, kind, digest.hexdigest(), sum(file.num_bytes for file in files), licence, files)


def _hash_file(path: Path) -> SourceFile:
    require_regular(path)
    # Before the hash: a change during it is then a change after it.
    stat = path.stat()
    return SourceFile(path, file_sha256(path), stat.st_size, stat.st_mtime_ns)


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while piece := file.read(1 << 20):
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _head(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read(HEAD_BYTES)


def _licence_in(head: bytes) -> str | None:
    match = SPDX.search(head)
    return match.group(1).decode() if match else None


@contextlib.contextmanager
def unchanged(file: SourceFile) -> Iterator[None]:
    """Refuses ``file`` when the block has read another one than was hashed."""
    with _readable(file.path):
        try:
            yield
        except (DataError, OSError, ValueError, pa.ArrowException):
            # What is wrong with the text is then the smaller news.
            _check_unchanged(file)
            raise
        _check_unchanged(file)


def _check_unchanged(file: SourceFile) -> None:
    if _hash_file(file.path) != file:
        raise DataError(
            f"{file.path} changed while it was read: it is not the file that was hashed at the start. "
            "Wait until nothing writes to it, and run the command again."
        )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What reading ``path`` may raise, in words."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}). Convert it, for example with iconv.") from error
    except pa.ArrowException as error:
        raise DataError(f"{path} is damaged or no {path.suffix} file ({error}). Copy it anew.") from error
    except OSError as error:
        if error.strerror:
            raise DataError(f"Cannot read {error.filename or path}: {error.strerror}. Check the path.") from error
        # Arrow's streams raise OSError without a number for what they cannot decompress.
        raise DataError(
            f"{path} is truncated or damaged: {error}. Copy it anew; gzip -t or zstd -t tests a copy."
        ) from error
