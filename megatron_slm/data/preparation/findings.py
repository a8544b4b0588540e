"""What the first pass keeps of every document it has judged: all but the text, as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from megatron_slm.data.preparation.reading import Chunk
from megatron_slm.data.preparation.staging import from_array, to_array
from megatron_slm.data.quality.leakage import Leak
from megatron_slm.data.quality.screen import Screen, Screened


class Finding(NamedTuple):
    """Of one document."""

    source: int
    """Place of its input among the sources."""
    num_characters: int
    """After scrubbing; 0 of a document that holds token ids."""
    screened: Screened
    """Its text is left out."""


@dataclass(frozen=True)
class Judge:
    """Chunks to findings, in any process."""

    screen: Screen | None
    """None: nothing is asked of the documents."""

    def __call__(self, chunk: Chunk) -> tuple[int, int, dict[str, np.ndarray]]:
        """The chunk's number, the number of its documents, and the findings as arrays for :func:`unpack`."""
        packed = {"sources": np.array(chunk.sources, dtype=np.int32)}
        texts = [document if isinstance(document, str) else "" for document in chunk.documents]
        if self.screen is not None:
            screened = [self.screen(text) for text in texts]
            texts = [one.text for one in screened]
            packed |= _pack(screened)
        packed["characters"] = np.array([len(text) for text in texts], dtype=np.int64)
        return chunk.number, len(texts), packed


def unpack(packed: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """The findings in the order of the documents."""
    sources, lengths = packed["sources"].tolist(), packed["characters"].tolist()
    screened = _unpack(packed) if "notes" in packed else itertools.repeat(Screened(""), len(lengths))
    yield from map(Finding, sources, lengths, screened)


def _pack(screened: Sequence[Screened]) -> dict[str, np.ndarray]:
    notes = [
        {
            "reason": one.reason,
            "leaks": [asdict(leak) for leak in one.leaks],
            "key": one.key,
            "scrubbed": one.scrubbed,
            "signed": one.signature is not None,
        }
        for one in screened
    ]
    signatures = [one.signature for one in screened if one.signature is not None]
    return {"notes": to_array(notes), "signatures": np.stack(signatures) if signatures else np.empty(0)}


def _unpack(packed: Mapping[str, np.ndarray]) -> Iterator[Screened]:
    signatures = iter(packed["signatures"])
    for note in from_array(packed["notes"]):
        yield Screened(
            text="",
            reason=note["reason"],
            leaks=tuple(Leak(**leak) for leak in note["leaks"]),
            key=note["key"],
            signature=next(signatures) if note["signed"] else None,
            scrubbed=note["scrubbed"],
        )
