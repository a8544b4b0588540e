"""The first reading: everything is read once, judged, and counted, so that bad input is refused before any work.

Documents are judged one by one in worker processes, a chunk at a time, and each chunk's findings are kept. Duplicates
are then decided in the order of the documents, which one process does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_slm.data.preparation.findings import Finding, Judge, unpack
from megatron_slm.data.preparation.reading import Chunk, Reader
from megatron_slm.data.preparation.request import Request
from megatron_slm.data.preparation.staging import Staging, from_array, to_array
from megatron_slm.data.preparation.workers import map_in_order
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.duplicates import Duplicates
from megatron_slm.data.quality.evidence import Evidence
from megatron_slm.data.quality.screen import Screen
from megatron_slm.errors import DataError

SCREENING = "screening"
KEPT = 0
"""Code of a document that is kept; the others are places in ``reasons``, counted from 1."""


@dataclass(frozen=True)
class Screening:
    """What becomes of every document, and the counts that say so."""

    starts: np.ndarray
    """[chunks + 1] number of each chunk's first document, and the number of documents."""
    codes: np.ndarray
    """[documents] :data:`KEPT`, or why not."""
    reasons: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]
    """Of each input: documents, kept, dropped by reason, scrubbed by pattern."""
    splits: dict[str, dict[str, int]]
    """Documents and characters that are kept, of each split that is wanted."""
    evidence: dict[str, Any]
    """The first places of what was found, as :meth:`Evidence.to_dict` tells them."""

    @property
    def num_chunks(self) -> int:
        return len(self.starts) - 1

    def keeps(self, document: int) -> bool:
        """Whether document number ``document`` is kept; one that was not there at the first reading is not."""
        return document < len(self.codes) and bool(self.codes[document] == KEPT)

    def kept(self, chunk: int) -> np.ndarray:
        """[documents of the chunk] bool."""
        kept: np.ndarray = self.codes[self.starts[chunk] : self.starts[chunk + 1]] == KEPT
        return kept


def screen(
    staging: Staging, reader: Reader, request: Request, quality: QualityConfig | None, workers: int
) -> Screening:
    """Read and judge everything, or take what an earlier command has finished of it.

    Args:
        quality: what is asked of the documents; None only counts them, which takes no worker.

    Raises:
        DataError: an input cannot be read or understood, or nothing remains for a split.
    """
    stored = staging.load(SCREENING)
    if stored is not None:
        return Screening(stored["starts"], stored["codes"], **from_array(stored["facts"]))
    judge = Judge(None if quality is None else Screen(quality))
    starts = _judge_chunks(staging, reader, judge, 1 if quality is None else workers)
    if len(starts) == 1:
        raise DataError("The inputs hold no document: every one is empty. Give some text.")
    screening = _decide(staging, starts, len(reader.sources), request, judge.screen)
    _check_splits(screening, request)
    facts = {name: getattr(screening, name) for name in ("reasons", "sources", "splits", "evidence")}
    staging.save(SCREENING, starts=screening.starts, codes=screening.codes, facts=to_array(facts))
    return screening


def _judge_chunks(staging: Staging, reader: Reader, judge: Judge, workers: int) -> list[int]:
    """Judge every chunk that an earlier command has not; returns where each begins, and the number of documents."""
    starts = [0]

    def tasks() -> Iterator[Chunk]:
        for chunk in reader.chunks():
            starts.append(chunk.numbers.stop)
            if not staging.has(_name(chunk.number)):
                yield chunk
            else:
                bar.update(len(chunk.documents))

    # disable=None: no bar unless standard error is a terminal.
    with tqdm(desc="screen", unit="document", disable=None) as bar:
        for number, num_documents, packed in map_in_order(judge, tasks(), workers):
            staging.save(_name(number), **packed)
            bar.update(num_documents)
    return starts


def _findings(staging: Staging, num_chunks: int) -> Iterator[Finding]:
    for number in range(num_chunks):
        yield from unpack(staging.load_finished(_name(number)))


def _decide(
    staging: Staging, starts: list[int], num_sources: int, request: Request, screen: Screen | None
) -> Screening:
    """Duplicates, and the counts, in the order of the documents."""
    duplicates, evidence = Duplicates(screen.config) if screen else None, Evidence()
    codes = np.zeros(starts[-1], dtype=np.uint16)
    reasons: dict[str, int] = {}
    sources = [_Counts() for _ in range(num_sources)]
    splits = {name: {"num_documents": 0, "num_characters": 0} for name in request.split_names}
    for document, (source, num_characters, screened) in enumerate(_findings(staging, len(starts) - 1)):
        original = duplicates.original(document, screened) if duplicates and screened.reason is None else None
        reason = screened.reason if original is None else f"{original[1]} duplicate"
        evidence.add(document, screened, original)
        sources[source].add(reason, screened.scrubbed)
        if reason is None:
            split = splits[request.split_of(document)]
            split["num_documents"] += 1
            split["num_characters"] += num_characters
        else:
            codes[document] = reasons.setdefault(reason, len(reasons) + 1)
    return Screening(
        np.array(starts, dtype=np.int64),
        codes,
        reasons=tuple(reasons),
        sources=tuple(counts.to_dict() for counts in sources),
        splits=splits,
        evidence=evidence.to_dict(),
    )


@dataclass
class _Counts:
    """Of one input."""

    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    scrubbed: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str | None, scrubbed: dict[str, int]) -> None:
        self.documents += 1
        if reason is None:
            self.scrubbed.update(scrubbed)
        else:
            self.dropped[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        dropped = dict(sorted(self.dropped.items()))
        return {
            "documents": self.documents,
            "kept": self.documents - sum(dropped.values()),
            "dropped": dropped,
            "scrubbed": dict(sorted(self.scrubbed.items())),
        }


def _check_splits(screening: Screening, request: Request) -> None:
    total, dropped = len(screening.codes), sum(sum(source["dropped"].values()) for source in screening.sources)
    filtered = f" (of which {dropped} are dropped: {', '.join(screening.reasons)})" if dropped else ""
    for name, split in screening.splits.items():
        if not split["num_documents"]:
            raise DataError(
                f"With --split {request.split} and --seed {request.seed} the {name} split gets none of the {total} "
                f"documents{filtered}. Give more documents, change --split (0 makes no valid split), or change --seed."
            )


def _name(number: int) -> str:
    """What the findings of a chunk are kept under."""
    return f"screen-{number:06d}"
