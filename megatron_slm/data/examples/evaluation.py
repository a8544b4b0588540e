"""Examples that an evaluation will ask about: those with the opening of one of its rows, or mostly of its words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_slm.data.documents import Source
from megatron_slm.data.examples.reading import RawRow, parsed, read_rows
from megatron_slm.data.examples.records import ROLE_NAMES, BadRow, opening_of, record_of, text_of
from megatron_slm.data.quality.leakage import LeakageIndex
from megatron_slm.data.quality.signature import exact_key
from megatron_slm.errors import DataError

NGRAM_WORDS = 13
"""As in Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C."""

TEXT_KEYS = ("question", "text")
"""Where the text lies in evaluation rows that are no examples."""


class EvaluationTexts:
    """Openings and n-grams to look for; may be sent to worker processes.

    Args:
        share: a text leaks when more than this share of its words lies in shared n-grams.
    """

    def __init__(self, share: float) -> None:
        self._openings: dict[str, str] = {}
        self._ngrams = LeakageIndex(NGRAM_WORDS, share)

    def add(self, name: str, rows: Iterable[tuple[str, str]]) -> None:
        """Look for (opening hash, text) of each row, which ``name`` holds."""
        texts = []
        for opening, text in rows:
            self._openings.setdefault(opening, name)
            texts.append(text)
        self._ngrams.add(name, texts)

    def leak(self, text: str, opening: str) -> str | None:
        """The name of what holds this opening, or mostly the words of ``text``; None when nothing does."""
        if opening in self._openings:
            return self._openings[opening]
        found = self._ngrams.find(text)
        return found[0].file if found else None


def evaluation_texts(sources: Sequence[Source], share: float) -> EvaluationTexts:
    """What the evaluation files hold: examples of any kind, or objects with a text under one of :data:`TEXT_KEYS`.

    Raises:
        DataError: a row is none of the known forms; the message names the line.
    """
    found = EvaluationTexts(share)
    for source in sources:
        found.add(source.path.name, (_row(row) for row in read_rows(source)))
    return found


def _row(row: RawRow) -> tuple[str, str]:
    """Opening hash and text."""
    try:
        content = parsed(row)
        record = record_of(_as_prompt(content), "prompt") if isinstance(content, dict) else record_of(content, "prompt")
    except BadRow as error:
        raise DataError(f"The evaluation row {row.place} {error.detail}.") from error
    return exact_key(opening_of(record)), text_of(record)


def _as_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that comes before its first answer, under ``prompt``."""
    for key in ("prompt", *TEXT_KEYS):
        if isinstance(row.get(key), str):
            return {"prompt": row[key]}
    messages: list[Any] = next(
        (row[key] for key in ("prompt", "messages", "conversations") if isinstance(row.get(key), list)), []
    )
    said_by = [one.get("role", one.get("from")) if isinstance(one, dict) else None for one in messages]
    ends = [
        place for place, name in enumerate(said_by) if isinstance(name, str) and ROLE_NAMES.get(name) == "assistant"
    ]
    return {"prompt": messages[: ends[0]] if ends else messages} if messages else row
