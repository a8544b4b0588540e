"""The cursor knows the data a run has seen, and refuses a resume that would see other data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_slm.data.cursor import IDENTITY, Cursor, check_resume
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import CheckpointError

ORDER = SampleOrder(1000, 1234, "a" * 64, 128)


def start() -> Cursor:
    return Cursor.start(ORDER, tokenizer_hash="b" * 64)


def test_advance_counts_samples_and_epochs() -> None:
    cursor = start().advance(900).advance(150)
    assert (cursor.consumed_samples, cursor.epoch) == (1050, 1)
    assert cursor.order == ORDER


def test_rolling_digest_is_of_samples_and_not_of_batches() -> None:
    one_batch = start().advance(1200)
    many = start()
    for size in (1, 7, 92, 800, 300):
        many = many.advance(size)
    assert many == one_batch


def test_rolling_digest_differs_after_other_samples() -> None:
    digests = {start().rolling_digest, start().advance(1).rolling_digest, start().advance(2).rolling_digest}
    for change in ({"seed": 1}, {"dataset_digest": "c" * 64}, {"seq_length": 64}, {"num_samples": 999}):
        other = dataclasses.replace(start(), **change)
        digests.add(other.advance(2).rolling_digest)
    assert len(digests) == 7


def test_stored_cursor_continues_alike() -> None:
    saved = start().advance(900)
    loaded = Cursor.from_dict(json.loads(json.dumps(saved.to_dict())))
    assert loaded == saved
    assert loaded.advance(100) == saved.advance(100) == start().advance(1000)


def test_resume_with_other_batch_or_target_is_allowed() -> None:
    check_resume(start().advance(900), start())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset_digest", "c" * 64),
        ("seed", 99),
        ("seq_length", 256),
        ("num_samples", 1001),
        ("order_version", 999),
        ("tokenizer_hash", "d" * 64),
    ],
)
def test_resume_with_other_samples_is_refused_by_name(field: str, value: Any) -> None:
    saved = start().advance(900)
    with pytest.raises(CheckpointError) as refused:
        check_resume(saved, dataclasses.replace(start(), **{field: value}))
    message = str(refused.value)
    assert f"{field}: {getattr(saved, field)} in the checkpoint, {value} now" in message
    assert [name for name in IDENTITY if f"  {name}: " in message] == [field]
    assert "after 900" in message


def test_every_changed_field_is_named() -> None:
    with pytest.raises(CheckpointError) as refused:
        check_resume(start(), dataclasses.replace(start(), seed=5, seq_length=64))
    assert "  seed: 1234 in the checkpoint, 5 now" in str(refused.value)
    assert "  seq_length: 128 in the checkpoint, 64 now" in str(refused.value)


def test_every_field_is_position_or_identity() -> None:
    """A new field must be thought about: does a change of it change the next samples?"""
    fields = {field.name for field in dataclasses.fields(Cursor)}
    assert fields - set(IDENTITY) == {"consumed_samples", "rolling_digest"}


@pytest.mark.parametrize("field", ["seed", "consumed_samples", "seq_length", "num_samples"])
def test_a_tampered_cursor_is_refused(field: str) -> None:
    stored = start().advance(900).to_dict()
    stored[field] += 1
    with pytest.raises(CheckpointError, match="contradicts itself") as refused:
        Cursor.from_dict(stored)
    assert "  " not in str(refused.value)


def test_a_cursor_of_another_version_is_left_to_the_resume_check() -> None:
    stored = {**start().advance(900).to_dict(), "order_version": 0, "next_samples_digest": "of another order"}
    with pytest.raises(CheckpointError, match="order_version: 0 in the checkpoint, 1 now"):
        check_resume(Cursor.from_dict(stored), start())


def test_a_cursor_with_other_fields_is_refused() -> None:
    stored = start().to_dict()
    del stored["seed"]
    with pytest.raises(CheckpointError, match=r"\['seed'\]"):
        Cursor.from_dict(stored)
