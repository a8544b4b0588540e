"""Rows to items: what counts in each kind, and every row that is refused by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.examples.encoding import ExampleEncoder
from megatron_slm.data.examples.special_tokens import TemplateTokenizer
from megatron_slm.data.examples.template import open_template
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.evaluate.compiled import compiled_task
from megatron_slm.evaluate.items import Asker, windows
from megatron_slm.run_eval import Wanted, evaluate
from tests.example_files import byte_level, compiled, pieces, write_rows


@pytest.fixture(scope="module", params=["pieces", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    make = {"pieces": pieces, "bytes": byte_level}[request.param]
    return make(tmp_path_factory.mktemp("tokenizer"))


def asker(tokenizer: Tokenizer, *, template: str | None = None, limit: int = 64) -> Asker:
    encoder = None
    if template is not None:
        encoder = ExampleEncoder(TemplateTokenizer(tokenizer), open_template(template, tokenizer))
    return Asker(tokenizer, encoder, limit)


def test_a_text_counts_whole_and_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "Wrap a single paragraph of text, returning a list of wrapped lines. " * 6
    task = asker(tokenizer, limit=16).task(write_rows(tmp_path / "t.jsonl", [{"text": text, "source": "a"}]))
    (item,) = task.items
    labels = [token for one in item.documents for token in one.tokens[one.weights != 0].tolist()]
    assert labels == tokenizer.encode(text) and len(item.documents) > 2 and item.num_bytes == (len(text.encode()),)
    assert all(len(one.tokens) <= 17 for one in item.documents) and item.source == "a"
    assert item.documents[0].tokens[0] == tokenizer.eod_id


@pytest.mark.parametrize("size", [1, 2, 16, 17, 18, 33, 50])
def test_windows_at_the_border(size: int) -> None:
    found = windows(np.arange(size), 16)
    assert [token for one in found for token in one.tokens[one.weights != 0].tolist()] == list(range(1, size))
    assert all(one.num_slots <= 16 for one in found)
    assert size < 17 or all(one.num_slots == 16 for one in found), "the last one reaches back"


@pytest.mark.parametrize("template", [None, "plain"])
def test_of_a_choice_the_answer_counts_and_not_the_prompt(
    tokenizer: Tokenizer, tmp_path: Path, template: str | None
) -> None:
    rows = [{"prompt": "The text", "choices": [" is wrapped", " is long"], "answer": " is long"}]
    (item,) = asker(tokenizer, template=template).task(write_rows(tmp_path / "t.jsonl", rows)).items
    for document, choice in zip(item.documents, rows[0]["choices"], strict=True):
        counted = document.tokens[document.weights != 0].tolist()
        assert tokenizer.decode(counted).strip() == str(choice).strip()
        before = tokenizer.decode(document.tokens[document.weights == 0].tolist())
        assert "The text" in before and "wrapped" not in before
    assert item.num_bytes == (11, 8)


def test_without_a_prompt_something_still_comes_before(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": "text", "expected": [-9, 0]}]
    (item,) = asker(tokenizer).task(write_rows(tmp_path / "t.jsonl", rows)).items
    document = item.documents[0]
    assert document.tokens[0] == tokenizer.eod_id and document.weights.tolist() == [0.0] + [1.0] * (
        len(document.tokens) - 1
    )


GOOD: dict[str, Any] = {"prompt": "p", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p"}, 'has neither "text"'),
        ([1], "not a JSON object"),
        ("{", "not JSON"),
        ({**GOOD, "choices": ["a"]}, "two texts or more"),
        ({**GOOD, "choices": "ab"}, "two texts or more"),
        ({**GOOD, "answer": 2}, "a place from 0 to 1"),
        ({**GOOD, "answer": True}, "a place from 0 to 1"),
        ({**GOOD, "prompt": 3}, "no text"),
        ({**GOOD, "prompt": "text " * 90}, "the model reads 64"),
        ({"prompt": "p", "completion": "c", "expected": [0, -1]}, r"give \[low, high\]"),
        ({"prompt": "p", "completion": "c", "expected": -1}, r"give \[low, high\]"),
        ({"prompt": "p", "completion": "", "expected": [-1, 0]}, "no text"),
        ({"prompt": "p", "verifier": "regex"}, "asks for generation, but the rows before it for choice"),
        ({**GOOD, "id": "first"}, "two rows have"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_by_its_line(
    tokenizer: Tokenizer, tmp_path: Path, row: Any, problem: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{**GOOD, "id": "first"}, row])
    with pytest.raises(DataError, match=problem) as refusal:
        asker(tokenizer).task(path)
    assert "two rows" in problem or f"{path}:2" in str(refusal.value)


@pytest.mark.parametrize("verifier", ["nosuch", {"name": "nosuch"}, 3, "own.py:judge"])
def test_an_unknown_verifier_is_refused_before_there_is_a_model(tmp_path: Path, verifier: Any) -> None:
    rows = [{"prompt": "p", "verifier": "exact_match", "answer": "a"}, {"prompt": "p", "verifier": verifier}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match="it must name one of arithmetic") as refusal:
        evaluate(tmp_path / "no_run", Wanted((path,)))
    assert f"{path}:2" in str(refusal.value)
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "no_run", Wanted((path,), limit=1))


def test_the_digest_is_of_what_is_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def digest(*rows: Any, template: str | None = None) -> str:
        return asker(tokenizer, template=template).task(write_rows(tmp_path / "t.jsonl", rows)).digest

    other = dict(reversed(list(GOOD.items())))
    assert digest(GOOD) == digest(other) != digest({**GOOD, "answer": 0})
    assert digest(GOOD) != digest(GOOD, GOOD) and digest(GOOD) != digest(GOOD, template="plain")


def test_what_was_compiled_is_held_out_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [{"prompt": f"text {number}", "completion": "wrapped text"} for number in range(30)]
    compiled(tmp_path, chats, tokenizer.path, valid_share=0.5)
    task = compiled_task(tmp_path / "out", tokenizer, window=8, limit=5)
    assert task.kind == "held_out" and len(task.items) == 5
    for item in task.items:
        counted = [token for one in item.documents for token in one.tokens[1:][one.weights[1:] != 0].tolist()]
        assert "wrapped text" in tokenizer.decode(counted) and item.num_bytes[0] >= len("wrapped text")
    other = (byte_level if tokenizer.kind == "sentencepiece" else pieces)(tmp_path / "other")
    with pytest.raises(DataError, match="was made with the tokenizer"):
        compiled_task(tmp_path / "out", other, window=8, limit=5)
