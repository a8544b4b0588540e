"""One file of one format to its documents. What calls these functions is :mod:`megatron_slm.data.documents`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import pyarrow as pa
import pyarrow.parquet

from megatron_slm.errors import DataError

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Compression by the last suffix of a name, in Arrow's words."""

PARQUET_BATCH_ROWS = 256


def require_regular(path: Path) -> None:
    """Refuse a pipe or a device, which may have no end and cannot be read twice; absent files are left to the reader.

    Raises:
        DataError: ``path`` is there, and neither a file nor a directory.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise DataError(
            f"{path} is a pipe, a socket or a device, but every input is read several times. Write its content to a "
            "file, and give that."
        )


def open_text(path: Path, *, newline: str | None = None) -> TextIO:
    """``path`` as UTF-8, decompressed while it is read; a byte order mark is no text.

    Args:
        newline: as in :func:`open`: None translates every line end to a line feed.
    """
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def open_bytes(path: Path) -> BinaryIO:
    """``path`` decompressed by its suffix; the end of a truncated file is an :class:`OSError`, not the end of text."""
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    stream = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


def read_jsonl(path: Path, text_key: str, key_option: str = "--text-key") -> Iterator[str]:
    """The string under ``text_key`` of each line that is not blank.

    Args:
        key_option: the option that sets ``text_key``, for refusals.

    Raises:
        DataError: a line is no JSON object, or has no string there; the message names the line.
    """
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{path}:{number} is not JSON ({reason}). Mend the line.") from error
            except RecursionError as error:
                raise DataError(f"{path}:{number} is nested too deeply to be read. Mend the line.") from error
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = f"its keys are {sorted(record)}" if isinstance(record, dict) else "it is no object"
                raise DataError(
                    f'{path}:{number} has no string under "{text_key}"; {keys}. Name the right key with {key_option}.'
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{path}:{number} holds half of a surrogate pair, which is no text. Mend the line."
                ) from error
            yield text


def read_text(path: Path, text_unit: str) -> Iterator[str]:
    """The whole file, or its paragraphs: blocks of lines separated by blank ones."""
    with open_text(path) as file:
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


def read_parquet(path: Path, text_key: str, key_option: str = "--text-key") -> Iterator[str]:
    """The strings of the column ``text_key``, one row group in memory at a time.

    Raises:
        DataError: there is no such column, it holds something else than strings, or a row has none.
    """
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _check_column(path, file.schema_arrow, text_key, key_option)
        row = 0
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[text_key], use_threads=False):
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise DataError(
                        f'{path} has no text in row {row} of the column "{text_key}" (rows are counted from 0). '
                        "Drop the rows without text first."
                    )
                yield text
                row += 1


def _check_column(path: Path, schema: pa.Schema, text_key: str, key_option: str) -> None:
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    places = schema.get_all_field_indices(text_key)
    if len(places) != 1:
        raise DataError(
            f'{path} has {len(places) or "no"} columns "{text_key}"; its columns are {columns}. '
            f"Name the column of the text with {key_option}."
        )
    kind = schema.field(places[0]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(
            f'The column "{text_key}" of {path} holds {schema.field(places[0]).type}, not strings; its columns are '
            f"{columns}. Name the column of the text with {key_option}."
        )
