"""Loss and gradient of every stage against other people's code: TRL, and functions of torchtune, verl and old TRL."""

from __future__ import annotations

import pytest

from tests import oracles

TOLERANCE = 1e-5
"""The oracles compute in fp32; ours here in float64."""


@pytest.mark.parametrize(("stage", "name"), oracles.cases())
def test_equals_the_oracle(stage: str, name: str) -> None:
    assert oracles.answer(stage, name).error <= TOLERANCE


@pytest.mark.parametrize(("stage", "name"), [case for case in oracles.cases() if case[0] in oracles.OURS])
def test_packed_in_one_row_equals_the_oracle(stage: str, name: str) -> None:
    assert oracles.answer(stage, name, oracles.in_one_row).error <= TOLERANCE
