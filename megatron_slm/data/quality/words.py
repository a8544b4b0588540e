"""Words and word n-grams, as near-duplicate search and the leakage check see a text.

Lower case, Unicode NFC, punctuation and symbols dropped (Brown et al. 2020, "Language Models are Few-Shot Learners",
appendix C). In scripts without spaces between words (Han, Kana, Thai, Lao, Burmese, Khmer) each character is a word.
"""

from __future__ import annotations

import functools
import re
import unicodedata

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Kana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""First and last code point of the scripts written without spaces."""

EMOJI = (0x1F000, 0x1FAFF)
"""Symbols outside the basic plane, as one range: a class of many single ones there makes `re` slow."""


def words(text: str) -> list[str]:
    """The words of ``text`` in order."""
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def ngrams(sequence: list[str], size: int) -> list[str]:
    """Every run of ``size`` consecutive words, joined by spaces; the whole sequence when it is shorter, and none of an
    empty one.
    """
    if len(sequence) <= size:
        return [" ".join(sequence)] if sequence else []
    return [" ".join(sequence[start : start + size]) for start in range(len(sequence) - size + 1)]


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """One unspaced character that is no punctuation, or a run of anything but spaces and punctuation."""
    # `re` has no name for categories, and \w would cut words at the vowel signs of Hindi.
    marks = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code))[0] in "PS"]
    dropped = re.escape("".join(marks)) + _span(*EMOJI)
    unspaced = "".join(_span(first, last) for first, last in UNSPACED)
    return re.compile(rf"(?![{dropped}])[{unspaced}]|[^\s{dropped}{unspaced}]+")


def _span(first: int, last: int) -> str:
    return f"{chr(first)}-{chr(last)}"
