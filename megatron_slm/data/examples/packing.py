"""Which documents share a row: best fit decreasing, by counting instead of searching.

The longest document goes first, each into the fullest row that still holds it. Documents of one length are placed
together: the fullest rows that hold the length take as many of it as fit, because a row that has just taken one is the
fullest again. So the work grows with the number of different lengths and not with the number of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PACKING_VERSION = 1
"""Raised when the same lengths would be packed otherwise; part of the digest of every packed source."""


@dataclass(frozen=True)
class Packing:
    """Items in rows.

    Attributes:
        items: int64 [items], row after row.
        starts: int64 [rows + 1], where the items of each row begin.
        used: slots of all rows together that hold an item.
        seq_length: slots of a row.
    """

    items: np.ndarray
    starts: np.ndarray
    used: int
    seq_length: int

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @property
    def efficiency(self) -> float:
        """Share of the slots that are no padding."""
        return self.used / (self.num_rows * self.seq_length) if self.num_rows else 0.0

    def row(self, number: int) -> np.ndarray:
        """Items of a row, int64 [n]."""
        return self.items[self.starts[number] : self.starts[number + 1]]


def best_fit_decreasing(lengths: np.ndarray, seq_length: int) -> Packing:
    """Pack items of ``lengths`` [items], each in 1..``seq_length``, into rows; the same lengths give the same rows."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return one_a_row(lengths, seq_length)
    assert 1 <= lengths.min() <= lengths.max() <= seq_length, "every item fits a row"
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(seq_length)
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, items in zip(sizes[::-1].tolist(), np.split(by_length, np.cumsum(counts[::-1])[:-1]), strict=True):
        while len(items):
            room, rows = rooms.tightest(size, len(items))
            each = room // size
            whole = min(len(items) // each, len(rows))
            row_of[items[: whole * each]] = np.repeat(rows[:whole], each)
            rooms.put(rows[:whole], room - each * size)
            items, rows = items[whole * each :], rows[whole:]
            if len(items) and len(rows):  # fewer than one more row would take
                row_of[items] = rows[0]
                rooms.put(rows[:1], room - len(items) * size)
                items, rows = items[:0], rows[1:]
            rooms.put(rows, room)
    return _packing(row_of, by_length, lengths, seq_length, rooms.num_rows)


class _Rooms:
    """Rows by how many slots they have left."""

    def __init__(self, seq_length: int) -> None:
        self.num_rows = 0
        self._seq_length = seq_length
        self._rows: list[list[np.ndarray]] = [[] for _ in range(seq_length + 1)]
        self._there = 0
        """Bit n: some row has n slots left."""

    def tightest(self, size: int, count: int) -> tuple[int, np.ndarray]:
        """All rows with the least room that holds ``size``, taken out; new ones for ``count`` items where none does."""
        fitting = self._there >> size
        if not fitting:
            first, self.num_rows = self.num_rows, self.num_rows - (-count // (self._seq_length // size))
            return self._seq_length, np.arange(first, self.num_rows)
        room = size + (fitting & -fitting).bit_length() - 1
        rows = np.concatenate(self._rows[room])
        self._rows[room], self._there = [], self._there & ~(1 << room)
        return room, rows

    def put(self, rows: np.ndarray, room: int) -> None:
        """Rows that have ``room`` slots left."""
        if len(rows):
            self._rows[room].append(rows)
            self._there |= 1 << room


def one_a_row(lengths: np.ndarray, seq_length: int) -> Packing:
    """Every item in a row of its own, in their order."""
    return Packing(np.arange(len(lengths)), np.arange(len(lengths) + 1), int(np.sum(lengths)), seq_length)


def _packing(row_of: np.ndarray, by_length: np.ndarray, lengths: np.ndarray, seq_length: int, num_rows: int) -> Packing:
    """Items sorted by row, inside a row longest first."""
    items = by_length[np.argsort(row_of[by_length], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]).astype(np.int64)
    return Packing(items, starts, int(lengths.sum()), seq_length)
