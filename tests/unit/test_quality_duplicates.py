"""Equal and similar documents are found, in document order, and different ones are not."""

from __future__ import annotations

import argparse
import inspect
import random

import pytest

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.duplicates import CANDIDATE_PROBABILITY, Duplicates, bands_and_rows
from megatron_slm.data.quality.screen import Screen
from megatron_slm.data.quality.signature import NUM_PERMUTATIONS, exact_key
from megatron_slm.data.quality.words import ngrams, words

SOURCE = inspect.getsource(argparse).split()
TEXTS = [" ".join(SOURCE[start : start + 120]) for start in range(0, len(SOURCE) - 120, 120)]


def originals(texts: list[str], **options: object) -> list[tuple[int, str] | None]:
    config = QualityConfig(**options)  # type: ignore[arg-type]
    screen, duplicates = Screen(config), Duplicates(config)
    return [duplicates.original(document, screen(text)) for document, text in enumerate(texts)]


def jaccard(first: str, second: str) -> float:
    one, other = set(ngrams(words(first), 5)), set(ngrams(words(second), 5))
    return len(one & other) / len(one | other)


def edited(text: str, edits: int, state: random.Random) -> str:
    changed = text.split()
    for place in state.sample(range(len(changed)), edits):
        changed[place] = f"word{state.randrange(10**6)}"
    return " ".join(changed)


def test_words_are_without_case_and_punctuation() -> None:
    assert words("Don't STOP -- e.g. x_1!") == ["don", "t", "stop", "e", "g", "x", "1"]
    assert words("Cafe\u0301") == words("café") == ["café"]
    assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"], "vowel signs are part of their word"
    assert words("文字abc文。 ไทย") == ["文", "字", "abc", "文", "ไ", "ท", "ย"]
    assert words("... 😀 —") == [] == ngrams([], 5)
    assert ngrams(["a", "b"], 5) == ["a b"] and ngrams(list("abc"), 2) == ["a b", "b c"]


def test_equal_texts_by_their_hash() -> None:
    assert exact_key("a  b\n\tc ") == exact_key(" a b c")
    assert exact_key("cafe\u0301") == exact_key("café")
    keys = {exact_key(text) for text in ("a b", "A b", "ab", "a b.", "a  c", "")}
    assert len(keys) == 6


def test_the_first_of_equal_documents_is_the_original() -> None:
    texts = ["one", "two", " one\n", "One", "two", "one"]
    assert originals(texts, exact_duplicates=True) == [None, None, (0, "exact"), None, (1, "exact"), (0, "exact")]


def test_only_what_is_asked_for_is_compared() -> None:
    assert originals(["one", "one"], min_characters=1) == [None, None]


def test_near_duplicates_at_the_threshold() -> None:
    state, texts, expected = random.Random(3), list(TEXTS), {}
    for document, text in enumerate(TEXTS):
        copy = edited(text, edits=(1, 4, 10)[document % 3], state=state)
        expected[len(texts)] = document, jaccard(text, copy)
        texts.append(copy)
    found = originals(texts, near_duplicates=0.7)
    # 0.15 is 3.7 standard deviations of the estimate.
    for copy, (document, similarity) in expected.items():
        if similarity > 0.85:
            assert found[copy] == (document, "near"), f"similarity {similarity}"
        if similarity < 0.55:
            assert found[copy] is None, f"similarity {similarity}"
    assert sum(similarity > 0.85 for _, similarity in expected.values()) > 10
    assert sum(similarity < 0.55 for _, similarity in expected.values()) > 10


def test_exact_duplicates_of_a_dropped_document_are_exact() -> None:
    text = " ".join(f"w{number}" for number in range(200))
    near = text.replace("w7 ", "x7 ")
    assert originals([text, near, near], near_duplicates=0.8) == [None, (0, "near"), (1, "exact")]


def test_texts_without_spaces_are_compared_by_characters() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(200))
    assert originals([text, text[:100] + "々" + text[101:], text[::-1]], near_duplicates=0.8)[1:] == [(0, "near"), None]


def test_texts_without_words_are_similar_to_nothing() -> None:
    assert originals(["!!!", "???", "!!!"], near_duplicates=0.5) == [None, None, (0, "exact")]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95, 1.0])
def test_bands_propose_what_is_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    assert 2 <= bands * rows <= NUM_PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= CANDIDATE_PROBABILITY
    assert originals(["a b c d e f g", "h i j k l m n", "a, b; c d e f G"], near_duplicates=threshold) == [
        None,
        None,
        (0, "near"),
    ]
