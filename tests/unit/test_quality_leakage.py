"""Documents that hold pieces of evaluation texts are found, near misses are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.evidence import NUM_EXAMPLES, Evidence
from megatron_slm.data.quality.screen import Screen
from megatron_slm.errors import DataError

QUESTION = "Which of the five rivers that rise in these hills reaches the sea first, and through which of its ports?"
SHORT = "Name every bone of the hand."


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    texts = [
        "Something else that no training document will ever say in as many words as these.",
        QUESTION,
        SHORT,
        "Yes.",
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def screen(*files: Path, **options: object) -> Screen:
    return Screen(QualityConfig(leakage_against=tuple(map(str, files)), **options))  # type: ignore[arg-type]


def test_a_planted_text_is_found_whatever_its_case_and_punctuation(questions: Path) -> None:
    planted = "Long before.\n" + QUESTION.upper().replace(",", " --").replace(" OF ", "\n of ") + "\nLong after."
    screened = screen(questions)(planted)
    assert screened.reason == "leak:questions.jsonl"
    (leak,) = screened.leaks
    assert (leak.file, leak.eval_document) == ("questions.jsonl", 1)
    assert leak.ngram == "which of the five rivers that rise in these hills reaches the sea"
    assert leak.share == round(20 / 24, 4)
    assert screened.key is None and screened.scrubbed == {}


def test_thirteen_words_of_it_are_enough_and_twelve_are_not(questions: Path) -> None:
    sequence = QUESTION.split()
    judge = screen(questions)
    assert judge("so " + " ".join(sequence[4:17]) + " end").reason == "leak:questions.jsonl"
    assert judge("so " + " ".join(sequence[4:16]) + " end").reason is None
    assert judge(" ".join([*sequence[:7], "never", *sequence[8:15], "again"])).reason is None
    assert judge(" ".join(reversed(sequence))).reason is None


def test_a_short_text_is_found_as_a_whole(questions: Path) -> None:
    judge = screen(questions)
    assert judge("Task: name every bone of the hand!").leaks[0].ngram == "name every bone of the hand"
    assert judge("name every bone of the").reason is None
    assert judge("name every bone of a hand").reason is None


def test_a_text_of_few_words_is_no_evidence(questions: Path) -> None:
    assert screen(questions)("Yes.").reason is None


def test_the_length_of_the_ngram_is_a_choice(questions: Path) -> None:
    piece = "here of the five rivers that rise in these places"
    assert screen(questions)(piece).reason is None
    assert screen(questions, leakage_ngram=8)(piece).reason == "leak:questions.jsonl"
    assert screen(questions, leakage_ngram=1)("these").leaks[0].ngram == "these"


def test_a_tolerated_share(questions: Path) -> None:
    text = QUESTION + " and" * 20
    assert screen(questions, leakage_share=0.4)(text).reason == "leak:questions.jsonl"
    assert screen(questions, leakage_share=0.6)(text).reason is None


def test_every_file_that_overlaps_is_named(questions: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(f"unlike\n\n{QUESTION}\n")
    screened = screen(other, questions)(QUESTION)
    assert screened.reason == "leak:other.txt"
    assert [(leak.file, leak.eval_document) for leak in screened.leaks] == [("other.txt", 1), ("questions.jsonl", 1)]


def test_files_of_one_name_are_told_apart(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / questions.name
    other.write_text(json.dumps({"text": "entirely unlike the texts of the first file"}) + "\n")
    assert screen(other, questions)(QUESTION).reason == f"leak:{questions}"


def test_evidence_counts_by_file_and_keeps_the_first(questions: Path) -> None:
    judge, evidence = screen(questions), Evidence()
    for document in range(NUM_EXAMPLES + 5):
        evidence.add(document, judge(QUESTION if document % 2 else "nothing"), (0, "exact") if document == 4 else None)
    found = evidence.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["duplicates"] == [{"document": 4, "repeats": 0, "kind": "exact"}]
    leaks = found["leaks"]["questions.jsonl"]
    assert leaks["documents"] == (NUM_EXAMPLES + 5) // 2
    assert [leak["document"] for leak in leaks["examples"]] == list(range(1, NUM_EXAMPLES + 5, 2))
    assert leaks["examples"][0]["eval_document"] == 1 and leaks["examples"][0]["ngram"].startswith("which of the five")


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.jsonl"):
        screen(tmp_path / "absent.jsonl")
    (tmp_path / "yes.txt").write_text("Yes.\n\nNo.\n")
    with pytest.raises(DataError, match=r"yes\.txt holds no text of 4 words or more.* with --decontaminate-key"):
        screen(tmp_path / "yes.txt")
    (tmp_path / "keys.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    with pytest.raises(DataError, match='no string under "text".*Name the right key with --decontaminate-key'):
        screen(tmp_path / "keys.jsonl")
    assert screen(tmp_path / "keys.jsonl", leakage_text_key="question")(QUESTION).reason == "leak:keys.jsonl"
