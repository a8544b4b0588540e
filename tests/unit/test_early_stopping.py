"""Early stopping counts validations since the best, over resumes and roll-backs."""

from __future__ import annotations

import json
import math

import pytest

from megatron_slm.train.early_stopping import EarlyStopping

LOSSES = [5.0, 4.0, 4.2, 3.9, 3.9, math.nan, 4.0, 3.0]


def ended_at(stopping: EarlyStopping, losses: list[float], first: int = 0) -> int | None:
    """Index of the validation after which the run ends; validations are ten steps apart."""
    for index, loss in enumerate(losses[first:], start=first):
        stopping.observe(loss, 10 * index)
        if stopping.finished:
            return index
    return None


@pytest.mark.parametrize(("patience", "end"), [(1, 2), (2, 5), (3, 6), (4, None)])
def test_ends_after_so_many_validations_without_a_new_best(patience: int, end: int | None) -> None:
    assert ended_at(EarlyStopping(patience), LOSSES) == end


def test_the_reason_names_the_best_step() -> None:
    stopping = EarlyStopping(3)
    ended_at(stopping, LOSSES)
    assert stopping.reason() == (
        "early stopping at step 60: 3 validations without a new best held-out loss; it was 3.900000 at step 30"
    )


@pytest.mark.parametrize("resume", range(7))
def test_a_resume_continues_the_count(resume: int) -> None:
    first = EarlyStopping(3)
    assert ended_at(first, LOSSES[:resume]) is None
    second = EarlyStopping(3, json.loads(json.dumps(first.record(), allow_nan=False)))
    assert ended_at(second, LOSSES, resume) == 6
    assert second.record()["best_step"] == 30


def test_more_patience_lets_an_ended_run_go_on() -> None:
    ended = EarlyStopping(3)
    ended_at(ended, LOSSES)
    assert EarlyStopping(3, ended.record()).finished and not EarlyStopping(4, ended.record()).finished


def test_a_validation_repeated_by_a_resume_counts_once() -> None:
    stopping = EarlyStopping(1)
    stopping.observe(5.0, 0)
    again = EarlyStopping(1, stopping.record())
    again.observe(5.0, 0)
    assert not again.finished


def test_a_roll_back_forgets_what_came_after() -> None:
    stopping = EarlyStopping(3)
    ended_at(stopping, LOSSES[:2])
    record = stopping.record()
    ended_at(stopping, LOSSES[:6], 2)
    stopping.restore(record)
    assert stopping.record() == record
    assert ended_at(stopping, LOSSES, 2) == 6


def test_losses_that_are_never_finite_end_the_run() -> None:
    stopping = EarlyStopping(2)
    assert ended_at(stopping, [math.nan, math.inf, 1.0]) == 1
    assert "none was finite" in stopping.reason() and stopping.record()["best_loss"] is None
