"""Cases that repeat on one more layout, schedule or signal what another shows: ``make test-full`` runs them too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

BREADTH = pytest.mark.breadth


def widely(values: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of a test: ``always`` in every run, the others in full ones."""
    chosen = list(values)
    assert set(always) <= set(chosen), "what is always run is one of them"
    return [value if value in always else pytest.param(value, marks=BREADTH) for value in chosen]
