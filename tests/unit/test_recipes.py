"""Every configuration in examples/ obeys every rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_a_recipe_breaks_no_rule(path: Path) -> None:
    resolved = load(path)
    assert violations(resolved.config, provenance=resolved.provenance) == []
