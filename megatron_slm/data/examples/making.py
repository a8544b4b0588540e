"""Chunks of rows to documents, in any process: the pass that reads, renders, tokenises and judges row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.data.documents import Source
from megatron_slm.data.examples.encoding import Encoded, ExampleEncoder
from megatron_slm.data.examples.evaluation import EvaluationTexts
from megatron_slm.data.examples.reading import RawRow, parsed, read_rows
from megatron_slm.data.examples.records import BadRow, Record, opening_of, record_of, text_of, transcript_of
from megatron_slm.data.examples.request import Options
from megatron_slm.data.preparation.staging import from_array, to_array
from megatron_slm.data.quality.signature import Signer, exact_key
from megatron_slm.errors import DataError

CHUNK_ROWS = 2048
"""A fraction of a second of work, and what a kill may cost."""


@dataclass
class RowChunk:
    """Some rows that follow each other; ``first`` is the number of its first over all inputs."""

    number: int
    first: int
    rows: list[RawRow] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


class Unit(NamedTuple):
    """One usable row.

    Attributes:
        number: of its row over all inputs.
        source: place of its input.
        place: file and line.
        text: what it says, for comparisons.
        opening: hash of what is said before the first answer.
        key: hash of everything that is said, and by whom.
        signature: [128] MinHash, None where near duplicates are not looked for.
        leak: the evaluation file whose text it has, or None.
        documents: of a preference the chosen and the rejected one, else one.
    """

    number: int
    source: int
    place: str
    text: str
    opening: str
    key: str
    signature: np.ndarray | None
    leak: str | None
    truncated: bool
    margin: float
    score: float | None
    fields: str
    documents: tuple[Encoded, ...]


class LeftOut(NamedTuple):
    """One row that cannot be used, and why."""

    source: int
    place: str
    reason: str
    detail: str


def chunks_of(sources: Sequence[Source]) -> Iterator[RowChunk]:
    """The rows of all inputs, numbered and cut into chunks: always the same for the same inputs."""
    chunk = RowChunk(0, 0)
    for place, source in enumerate(sources):
        for row in read_rows(source):
            chunk.rows.append(row)
            chunk.sources.append(place)
            if len(chunk.rows) == CHUNK_ROWS:
                yield chunk
                chunk = RowChunk(chunk.number + 1, chunk.first + CHUNK_ROWS)
    if chunk.rows:
        yield chunk


@dataclass(frozen=True)
class Maker:
    """A chunk of rows to its units, as arrays for :func:`unpack`."""

    options: Options
    encoder: ExampleEncoder
    evaluation: EvaluationTexts | None = None

    def __call__(self, chunk: RowChunk) -> tuple[int, int, dict[str, np.ndarray]]:
        """The chunk's number, the number of its rows, and what became of them.

        Raises:
            DataError: a row cannot be used, and rows are not skipped.
        """
        signer = Signer() if self.options.duplicates == "near" else None
        units: list[Unit] = []
        left_out: list[LeftOut] = []
        for at, (row, source) in enumerate(zip(chunk.rows, chunk.sources, strict=True)):
            try:
                units.append(self._unit(row, chunk.first + at, source, signer))
            except BadRow as error:
                if self.options.on_bad_row == "stop":
                    raise DataError(
                        f"{row.place} {error.detail}. With --on-bad-row skip such rows are left out and counted."
                    ) from error
                left_out.append(LeftOut(source, row.place, error.reason, error.detail))
        return chunk.number, len(chunk.rows), pack(units, left_out, chunk.sources)

    def _unit(self, row: RawRow, number: int, source: int, signer: Signer | None) -> Unit:
        record = record_of(parsed(row), self.options.kind, self.options.score_key)
        documents, truncated = self._documents(record)
        text, opening = text_of(record), exact_key(opening_of(record))
        return Unit(
            number=number,
            source=source,
            place=row.place,
            text=text,
            opening=opening,
            key=exact_key(transcript_of(record)),
            signature=signer(text) if signer else None,
            leak=self.evaluation.leak(text, opening) if self.evaluation else None,
            truncated=truncated,
            margin=record.margin,
            score=record.score,
            fields=json.dumps(record.fields, sort_keys=True, default=str) if record.fields else "",
            documents=documents,
        )

    def _documents(self, record: Record) -> tuple[tuple[Encoded, ...], bool]:
        """The record's documents, each within the length, and whether one was cut."""
        limit = self.options.seq_length
        if self.options.kind == "prompt":
            documents: tuple[Encoded, ...] = (self.encoder.prompt(record),)
        else:
            documents = tuple(self.encoder.conversation(record, answer) for answer in record.answers)
        total = sum(len(document.tokens) for document in documents)
        if total <= limit:
            return documents, False
        if self.options.kind == "preference":
            raise BadRow("longer than the sequence", f"is a pair of {total} tokens together; --seq-length is {limit}")
        if self.options.kind == "prompt" or documents[0].first_trained >= limit:
            before = min(total, documents[0].first_trained)
            raise BadRow("prompt longer than the sequence", f"has a prompt of {before} tokens; --seq-length is {limit}")
        if self.options.too_long != "truncate":
            raise BadRow(
                "longer than the sequence",
                f"has {total} tokens; --seq-length is {limit}, and --too-long truncate would cut the end",
            )
        return (documents[0].cut(limit),), True


def pack(units: Sequence[Unit], left_out: Sequence[LeftOut], sources: Sequence[int]) -> dict[str, np.ndarray]:
    """Units as arrays."""
    documents = [document for unit in units for document in unit.documents]
    signatures = [unit.signature for unit in units if unit.signature is not None]
    notes = [
        {
            **{name: value for name, value in unit._asdict().items() if name not in ("signature", "documents")},
            "signed": unit.signature is not None,
            "count": len(unit.documents),
        }
        for unit in units
    ]
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *(one.tokens for one in documents)]).astype(np.int32),
        "weights": np.concatenate([np.empty(0, np.float32), *(one.weights for one in documents)]),
        "roles": np.concatenate([np.empty(0, np.uint8), *(one.roles for one in documents)]),
        "lengths": np.array([len(one.tokens) for one in documents], dtype=np.int64),
        "signatures": np.stack(signatures) if signatures else np.empty(0),
        "notes": to_array({"units": notes, "left_out": left_out}),
        "rows": np.array(sources, dtype=np.int32),
    }


def unpack(packed: Mapping[str, np.ndarray]) -> tuple[list[Unit], list[LeftOut]]:
    """The inverse of :func:`pack`."""
    notes: dict[str, Any] = from_array(packed["notes"])
    signatures = iter(packed["signatures"])
    ends = np.cumsum(packed["lengths"])
    bounds = iter(zip(ends - packed["lengths"], ends, strict=True))
    units = []
    for note in notes["units"]:
        signed, count = note.pop("signed"), note.pop("count")
        spans = [next(bounds) for _ in range(count)]
        parts = tuple(Encoded(*(packed[name][i:j] for name in ("tokens", "weights", "roles"))) for i, j in spans)
        units.append(Unit(**note, signature=next(signatures) if signed else None, documents=parts))
    return units, [LeftOut(*one) for one in notes["left_out"]]
