"""Which language a text is in, by py3langid."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.errors import DataError

READ_CHARACTERS = 1000
"""The beginning tells: from 60 characters on, 400 of 400 pieces of the King James Bible were taken for English."""

FEWEST_LETTERS = 20
"""Shorter texts are kept unseen: every twentieth of this length, and every fourth of half, is taken for another."""


def check_languages(languages: Sequence[str]) -> None:
    """Load the model, and compare ``languages`` with those it knows.

    Raises:
        DataError: a code is unknown.
    """
    from py3langid import langid

    known = {name for name, _ in langid.rank("")}
    unknown = [name for name in languages if name not in known]
    if any("," in name for name in unknown):
        raise DataError(f"--language is {' '.join(languages)}, but codes are separated by spaces: --language en de.")
    if unknown:
        raise DataError(
            f"The language filter does not know {', '.join(unknown)}; it knows the ISO codes {' '.join(sorted(known))}."
        )


def language_of(text: str) -> str | None:
    """ISO code of the language of ``text``, or None when its beginning holds too few letters to tell."""
    from py3langid import langid

    beginning = text[:READ_CHARACTERS]
    if sum(character.isalpha() for character in beginning) < FEWEST_LETTERS:
        return None
    return str(langid.classify(beginning)[0])
