"""The first places of what was found, so that a person can look at them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_slm.data.quality.screen import Screened

NUM_EXAMPLES = 10


class Evidence:
    """Collects over the documents, in order; :meth:`to_dict` is what the manifest holds under ``evidence``."""

    def __init__(self) -> None:
        self._duplicates: list[dict[str, Any]] = []
        self._leaks: dict[str, dict[str, Any]] = {}

    def add(self, document: int, screened: Screened, original: tuple[int, str] | None) -> None:
        """Take note of one document; ``original`` is what :meth:`.duplicates.Duplicates.original` says of it."""
        if original is not None and len(self._duplicates) < NUM_EXAMPLES:
            self._duplicates.append({"document": document, "repeats": original[0], "kind": original[1]})
        for leak in screened.leaks:
            found = self._leaks.setdefault(leak.file, {"documents": 0, "examples": []})
            found["documents"] += 1
            if len(found["examples"]) < NUM_EXAMPLES:
                place = {name: value for name, value in asdict(leak).items() if name != "file"}
                found["examples"].append({"document": document, **place})

    def to_dict(self) -> dict[str, Any]:
        """JSON. ``duplicates``: the first, each with the document it repeats. ``leaks``: by evaluation file, how many
        documents share an n-gram with it (one may with several files) and the first of them.
        """
        return {"duplicates": self._duplicates, "leaks": self._leaks}
