"""The cursor knows the data a run has seen, and is stored so that it can be trusted."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import CheckpointError

ORDER = MixtureOrder.of_one("books", SampleOrder(1000, 1234, "a" * 64, 128))
MIXTURE = MixtureOrder(
    (Source("books", SampleOrder(1000, 1234, "a" * 64, 128)), Source("code", SampleOrder(30, 1234, "c" * 64, 128))),
    (
        Phase.of(0, {"books": Fraction(7), "code": Fraction(3)}),
        Phase.of(500, {"books": Fraction(1), "code": Fraction(1)}),
    ),
)
BOTH = pytest.mark.parametrize("order", [ORDER, MIXTURE], ids=["one corpus", "mixture"])


def start(order: MixtureOrder = ORDER) -> Cursor:
    return Cursor.start(order, tokenizer_hash="b" * 64)


def stored_and_loaded(cursor: Cursor) -> Cursor:
    return Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))


def test_advance_counts_samples_of_each_source() -> None:
    cursor = start(MIXTURE).advance(400).advance(200)
    assert cursor.consumed_samples == 600
    assert cursor.consumed_by_source == {"books": 350 + 50, "code": 150 + 50}


@BOTH
def test_rolling_digest_is_of_samples_and_not_of_batches(order: MixtureOrder) -> None:
    one_batch = start(order).advance(1200)
    many = start(order)
    for size in (1, 7, 92, 800, 300):
        many = many.advance(size)
    assert many == one_batch


def test_rolling_digest_differs_after_other_samples() -> None:
    digests = {start().rolling_digest, start().advance(1).rolling_digest, start().advance(2).rolling_digest}
    for order in (
        MixtureOrder.of_one("books", SampleOrder(1000, 1, "a" * 64, 128)),
        MixtureOrder.of_one("books", SampleOrder(1000, 1234, "c" * 64, 128)),
        MixtureOrder.of_one("books", SampleOrder(1000, 1234, "a" * 64, 64)),
        MixtureOrder.of_one("books", SampleOrder(999, 1234, "a" * 64, 128)),
        MIXTURE,
    ):
        digests.add(start(order).advance(2).rolling_digest)
    assert len(digests) == 8


def test_the_same_data_under_another_name_has_the_same_digest() -> None:
    renamed = MixtureOrder.of_one("kjv", ORDER.sources[0].order)
    assert start(renamed).advance(9).rolling_digest == start().advance(9).rolling_digest


@BOTH
def test_stored_cursor_continues_alike(order: MixtureOrder) -> None:
    saved = start(order).advance(300).skip(7).advance(593)
    loaded = stored_and_loaded(saved)
    assert loaded == saved
    assert loaded.advance(100) == saved.advance(100)


def test_skipped_positions_are_counted_apart_and_leave_the_digest_alone() -> None:
    cursor = start(MIXTURE).advance(100).skip(8).skip(4).advance(10).skip(2)
    assert (cursor.consumed_samples, cursor.skipped_samples) == (124, 14)
    assert cursor.skipped == ((100, 112), (122, 124))
    assert sum(cursor.consumed_by_source.values()) == 124
    assert start().advance(5).skip(3).rolling_digest == start().advance(5).rolling_digest
    assert start().skip(3).advance(5).rolling_digest != start().advance(5).rolling_digest
    assert start().skip(0) == start()


def test_shares_the_run_decides_hold_from_the_position_on_and_are_stored() -> None:
    cursor = start(MIXTURE).advance(100)
    changed = cursor.with_phase({"books": Fraction(1), "code": Fraction(4)})
    assert changed.order.sample_ids(0, 100)[0].tolist() == cursor.order.sample_ids(0, 100)[0].tolist()
    assert changed.advance(300).consumed_by_source == {"books": 70 + 60, "code": 30 + 240}
    loaded = stored_and_loaded(changed.advance(300))
    assert loaded == changed.advance(300) and [one.adaptive for one in loaded.order.phases] == [False, True, False]
    assert changed.with_phase({"books": Fraction(2), "code": Fraction(8)}) is changed, "the same shares"


@BOTH
@pytest.mark.parametrize("field", ["consumed_samples", "seq_length", "rolling_digest"])
def test_a_tampered_field_is_refused(order: MixtureOrder, field: str) -> None:
    stored = start(order).advance(900).to_dict()
    stored[field] = stored[field] + 1 if isinstance(stored[field], int) else stored[field][::-1]
    with pytest.raises(CheckpointError, match="contradicts itself: it says .*next_samples_digest"):
        Cursor.from_dict(stored)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sources", 1, "seed"), 1235),
        (("sources", 0, "num_samples"), 1001),
        (("sources", 1, "dataset_digest"), "d" * 64),
        (("phases", 0, "parts", "code"), 4),
        (("phases", 1, "start"), 400),
        (("phases", 1, "start"), -4),
        (("phases", 0, "start"), 1),
        (("phases", 0, "parts"), {}),
        (("phases", 1, "parts", "books"), 0),
        (("phases", 1, "parts"), {"unknown": 1}),
        (("consumed_by_source", "code"), 199),
        (("sources",), []),
        (("sources", 0, "num_samples"), 0),
        (("skipped",), [[1]]),
        (("consumed_samples",), "many"),
        (("rolling_digest",), "not hex"),
    ],
)
def test_a_tampered_source_or_phase_is_refused(path: tuple[Any, ...], value: Any) -> None:
    stored = json.loads(json.dumps(start(MIXTURE).advance(900).to_dict()))
    place = stored
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match="Resume from an earlier|resume from an earlier"):
        Cursor.from_dict(stored)


def test_a_cursor_of_another_version_is_refused_by_version() -> None:
    with pytest.raises(CheckpointError, match="order_version: 1 in the checkpoint, 2 now"):
        Cursor.from_dict({"order_version": 1, "num_samples": 3})
    with pytest.raises(CheckpointError, match="order_version: None"):
        Cursor.from_dict({})


@pytest.mark.parametrize("field", ["sources", "next_samples_digest", "skipped"])
def test_a_cursor_with_other_fields_is_refused(field: str) -> None:
    stored = start().to_dict()
    del stored[field]
    with pytest.raises(CheckpointError, match=field):
        Cursor.from_dict(stored)
    with pytest.raises(CheckpointError, match="surprise"):
        Cursor.from_dict({**start().to_dict(), "surprise": 1})


def test_every_field_is_stored() -> None:
    """A new field must be thought about: is it stored, and does a change of it change the next samples?"""
    fields = {field.name for field in dataclasses.fields(Cursor)}
    assert fields == {"order", "tokenizer_hash", "consumed_samples", "skipped", "rolling_digest"}
    assert set(start().to_dict()) == (fields - {"order"}) | {
        "order_version", "seq_length", "sources", "phases", "consumed_by_source", "next_samples_digest",
    }  # fmt: skip
