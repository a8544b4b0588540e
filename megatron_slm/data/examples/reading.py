"""Files to rows, each with its place, so that a refusal can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from megatron_slm.data.documents import Source, unchanged
from megatron_slm.data.examples.records import BadRow
from megatron_slm.data.readers import PARQUET_BATCH_ROWS, open_text
from megatron_slm.errors import DataError


class RawRow(NamedTuple):
    """One row before anything of it is understood; ``text`` is its JSON, as the file has it."""

    place: str
    text: str


def check_sources(sources: list[Source]) -> None:
    """Refuse what holds no rows.

    Raises:
        DataError: an input is neither JSONL nor Parquet.
    """
    for source in sources:
        if source.kind not in ("jsonl", "parquet"):
            raise DataError(
                f"{source.path} is read as {source.kind}, but examples are rows; give .jsonl (also .gz, .zst) or "
                ".parquet."
            )


def read_rows(source: Source) -> Iterator[RawRow]:
    """The rows of ``source`` that are not blank, in order.

    Raises:
        DataError: a file cannot be read, or is not the one that was hashed.
    """
    for file in source.files:
        with unchanged(file):
            yield from _of_parquet(file.path) if source.kind == "parquet" else _of_jsonl(file.path)


def parsed(row: RawRow) -> Any:
    """What the JSON of a row says.

    Raises:
        BadRow: it is none.
    """
    try:
        return json.loads(row.text)
    except ValueError as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("not JSON", f"is not JSON ({reason}); mend the line") from error
    except RecursionError as error:
        raise BadRow("not JSON", "is nested too deeply to be read; mend the line") from error


def _of_jsonl(path: Path) -> Iterator[RawRow]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield RawRow(f"{path}:{number}", line)


def _of_parquet(path: Path) -> Iterator[RawRow]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        number = 0
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                # A column that a row does not have is null in it.
                said = {name: value for name, value in row.items() if value is not None}
                yield RawRow(f"{path} row {number} (from 0)", json.dumps(said, default=str))
                number += 1
