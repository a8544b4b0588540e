"""What ``mslm generate`` prints: whole characters, nothing before a refusal; what it reads; and a conversation."""

from __future__ import annotations

import argparse
import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from megatron_slm import cli
from megatron_slm.commands.generate import read_prompts
from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer
from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.rollout.chat import Conversation
from megatron_slm.run_generate import text_after

SOURCE = inspect.getsource(argparse)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([SOURCE], 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def with_dummy_prefix() -> Tokenizer:
    """A tokenizer as many published models have one: decoding drops the first space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), Path("dummy-prefix.model"))


@pytest.mark.parametrize(
    "text", ["ﷺ é 😀", "ﷺé😀", "a 😀 b", "é", "the \ufffd end", "ends with \ufffd", " two  spaces\n"]
)
@pytest.mark.parametrize("prompt", ["", "def main", "def ", "é", "\ufffd"])
def test_pieces_are_whole_characters_and_lose_none(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = list(text_after(tokenizer, tokenizer.encode(prompt), ids))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_character_over_several_tokens_is_one_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ﷺ é 😀")
    assert len(ids) > 5, "these characters must be spelled in bytes for this test to say anything"
    pieces = text_after(tokenizer, tokenizer.encode("x"), ids)
    assert [piece.strip() for piece in pieces if piece.strip()] == ["ﷺ", "é", "😀"]


def test_a_cut_character_is_shown_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    pieces = list(text_after(tokenizer, [], ids))
    assert pieces[0] == "a" and set("".join(pieces[1:])) == {"\ufffd"}


def test_a_dummy_prefix_loses_no_space(with_dummy_prefix: Tokenizer) -> None:
    whole = with_dummy_prefix.encode("return the parser é")
    prompt = with_dummy_prefix.encode("return")
    assert whole[: len(prompt)] == prompt
    ids = whole[len(prompt) :]
    assert with_dummy_prefix.decode(ids) == "the parser é", "this tokenizer does drop the first space"
    assert "".join(text_after(with_dummy_prefix, prompt, ids)) == " the parser é"


def _refuses(*_: object, **__: object) -> Iterator[str]:
    raise CheckpointError("runs/nope holds no checkpoint.")
    yield ""


def _says(*_: object, **__: object) -> Iterator[str]:
    yield from (" there", " was")


def test_the_prompt_is_printed_once_and_not_before_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stub, code, out, errors in (
        (_refuses, 2, "", "mslm: runs/nope holds no checkpoint.\n"),
        (_says, 0, "In the there was\n", ""),
        (lambda *_, **__: iter(()), 0, "In the\n", ""),
    ):
        monkeypatch.setattr("megatron_slm.run_generate.generate", stub)
        assert cli.main(["generate", "runs/nope", "--prompt", "In the", "--one-rank"]) == code
        assert capsys.readouterr() == (out, errors)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--temperature=nan", "--temperature nan must be at least 0 and finite"),
        ("--temperature=inf", "--temperature inf must"),
        ("--temperature=-0.1", "--temperature -0.1 must"),
        ("--top-p=0", "--top-p 0.0 above 0 and at most 1"),
        ("--top-p=nan", "--top-p nan above 0"),
        ("--top-k=-1", "--top-k -1 at least 0"),
        ("--max-new-tokens=0", "--max-new-tokens 0 and"),
        ("--batch-size=0", "--batch-size 0 must"),
    ],
)
def test_options_out_of_range_are_refused(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "runs/nope", "--prompt", "x", option]) == 2
    assert said in capsys.readouterr().err


def test_prompts_are_read_from_text_and_from_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one\n\n two words\n")
    assert read_prompts(text) == ["one", " two words"]
    lines.write_text("\n".join(json.dumps({"prompt": prompt, "answer": 3}) for prompt in ("a\nb", "")))
    assert read_prompts(lines) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff", "Cannot read the prompts"),
        ("none.txt", None, "Cannot read the prompts"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: no string under"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "line 3: not JSON"),
        ("p.jsonl", b'["prompt"]\n', "line 1: no string under"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_a_conversation_grows_forgets_and_begins_anew(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, "plain", system="Be brief", limit=120)
    first = conversation.ask("What is it?", room=20)
    assert tokenizer.decode(first) == "System:\nBe brief\nUser:\nWhat is it?\nAssistant:\n"
    assert conversation.stop_ids == [tokenizer.eod_id, tokenizer.eod_id]
    conversation.answered("That")
    second = conversation.ask("And this?", room=20)
    assert second[: len(first)] == first and len(second) > len(first)
    while "What is it?" in tokenizer.decode(second):
        conversation.answered("That")
        second = conversation.ask("And this?", room=20)
        assert len(second) <= 100
    assert tokenizer.decode(second).startswith("System:\nBe brief\nUser:\nAnd this?")
    conversation.reset()
    assert conversation.ask("What is it?", room=20) == first


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, "plain", system=None, limit=64)
    first = conversation.ask("one", room=20)
    for text, message in (("two " * 100, "the model reads 64"), ("two </s>", "spells the special token </s>")):
        with pytest.raises(DataError, match=message):
            Conversation(tokenizer, "plain", system=None, limit=64).ask(text, room=20)
        with pytest.raises(DataError, match=message):
            conversation.ask(text, room=20)
    conversation.answered("three")
    assert tokenizer.decode(conversation.ask("four", room=20)).startswith(tokenizer.decode(first))
