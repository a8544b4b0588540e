"""Files of one JSON object a line, of which a crash may have torn the last. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

Kept = TypeVar("Kept")


def read_lines(path: Path, kind: type[Kept]) -> list[Kept]:
    """Every line as a ``kind``, oldest first; what is torn is left out, and no file is an empty one."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
