"""One document at a time: is it kept, and what remains of its text."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.language import check_languages, language_of
from megatron_slm.data.quality.leakage import Leak, LeakageIndex
from megatron_slm.data.quality.personal import scrub
from megatron_slm.data.quality.signature import Signer, exact_key


@dataclass(frozen=True)
class Screened:
    """What became of one document; small and plain, to be sent between processes.

    Attributes:
        text: scrubbed, or as it was when the document is dropped.
        reason: why it is dropped ("short", "long", "language:fr", "leak:eval.jsonl"), or None.
        leaks: the first shared n-gram with each evaluation file.
        key: hash of the text without differences of white space; None when duplicates are not looked for.
        signature: [128] MinHash of the text; None when near-duplicates are not looked for, or the text has no word.
        scrubbed: replacements by pattern.
    """

    text: str
    reason: str | None = None
    leaks: tuple[Leak, ...] = ()
    key: str | None = None
    signature: np.ndarray | None = None
    scrubbed: dict[str, int] = field(default_factory=dict)


class Screen:
    """Everything about a document that does not depend on the others; may be sent to worker processes.

    The evaluation files are read here, once. Order of the filters: length, language, leakage, then personal data, and
    the hash and the signature of what is left of the text.

    Raises:
        DataError: an evaluation file cannot be read, or a language is unknown.
    """

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        self.leakage = LeakageIndex.of(config) if config.leakage_against else None
        if config.languages:
            check_languages(config.languages)
        self._signer: Signer | None = None

    def __call__(self, text: str) -> Screened:
        """Judge one document."""
        reason = self._length(len(text)) or self._language(text)
        if reason is not None:
            return Screened(text, reason)
        leaks = self.leakage.find(text) if self.leakage else ()
        if leaks:
            return Screened(text, f"leak:{leaks[0].file}", leaks)
        text, scrubbed = scrub(text) if self.config.scrub_pii else (text, {})
        return Screened(text, key=self._key(text), signature=self._signature(text), scrubbed=scrubbed)

    def _length(self, size: int) -> str | None:
        if size < self.config.min_characters:
            return "short"
        if self.config.max_characters is not None and size > self.config.max_characters:
            return "long"
        return None

    def _language(self, text: str) -> str | None:
        if not self.config.languages:
            return None
        language = language_of(text)
        return None if language is None or language in self.config.languages else f"language:{language}"

    def _key(self, text: str) -> str | None:
        wanted = self.config.exact_duplicates or self.config.near_duplicates is not None
        return exact_key(text) if wanted else None

    def _signature(self, text: str) -> np.ndarray | None:
        if self.config.near_duplicates is None:
            return None
        if self._signer is None:
            self._signer = Signer()
        return self._signer(text)
