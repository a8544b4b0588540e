"""The tokenizer loses nothing, is the same file every time, and is refused when it is another."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer
from megatron_slm.data.tokenizer_sentencepiece import EOS_ID, LONGEST_LINE_CHARACTERS, MODEL_TYPES
from megatron_slm.errors import DataError

TEXTS = [inspect.getsource(argparse), inspect.getsource(json)]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, model_type: str) -> Tokenizer:
    return train_tokenizer(TEXTS, 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", model_type=model_type)


def test_trained_tokenizer_has_the_size_and_ids_it_was_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert tokenizer.eod_id == EOS_ID == 2
    assert (tokenizer.kind, tokenizer.file_name) == ("sentencepiece", "tokenizer.model")
    assert [tokenizer.piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "\n"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\n\n a",
        " leading",
        "trailing  ",
        "a\tb\r\nc",
        "</s><s><pad>",
        "日本語 😀 é",
        "\0x",
        "<0x41>",
        "ﬁ á",
        *TEXTS,
    ],
)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, EOS_ID, 3} & set(ids), "a control piece came out of text"


def test_decode_undoes_encode_for_random_text(tokenizer: Tokenizer) -> None:
    random_state = random.Random(0)
    for _ in range(300):
        points = (
            random_state.choice([random_state.randrange(32, 127), random_state.randrange(0x10000)]) for _ in range(40)
        )
        text = "".join(chr(point) for point in points if point != 0x2581 and not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_pieces_of_a_document_gives_pieces_of_its_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[1])
    assert "".join(tokenizer.decode(ids[i : i + 17]) for i in range(0, len(ids), 17)) == TEXTS[1]


def test_batches_and_threads_change_nothing(tokenizer: Tokenizer) -> None:
    lines = TEXTS[0].splitlines()
    assert tokenizer.encode_batch(lines, num_threads=2) == [tokenizer.encode(line) for line in lines]


def test_training_is_reproducible_and_depends_on_the_text(
    tokenizer: Tokenizer, model_type: str, tmp_path: Path
) -> None:
    again = train_tokenizer(TEXTS, 600, tmp_path / "again.model", model_type=model_type)
    assert again.hash == tokenizer.hash == hashlib.sha256((tmp_path / "again.model").read_bytes()).hexdigest()
    assert train_tokenizer(TEXTS[:1], 600, tmp_path / "other.model", model_type=model_type).hash != tokenizer.hash


def test_the_two_types_differ_and_there_is_no_third(tmp_path: Path) -> None:
    bpe, unigram = (train_tokenizer(TEXTS, 600, tmp_path / name, model_type=name) for name in MODEL_TYPES)
    assert bpe.encode(TEXTS[0]) != unigram.encode(TEXTS[0])
    with pytest.raises(DataError, match="type of the tokenizer is word, but it must be one of bpe, unigram"):
        train_tokenizer(TEXTS, 600, tmp_path / "word", model_type="word")


def test_a_very_long_line_and_nul_are_trained_on(tmp_path: Path) -> None:
    line = "alpha beta gamma delta " * (3 * LONGEST_LINE_CHARACTERS // 23) + "\0"
    tokenizer = train_tokenizer([line], 280, tmp_path / "t.model")
    assert len(tokenizer.encode("alpha beta gamma delta")) < 15, "the long line was dropped unread"


def test_open_accepts_the_right_hash_and_refuses_another(tokenizer: Tokenizer) -> None:
    assert Tokenizer.open(tokenizer.path, tokenizer.hash).encode("def f") == tokenizer.encode("def f")
    with pytest.raises(DataError) as refused:
        Tokenizer.open(tokenizer.path, "0" * 64)
    assert tokenizer.hash in str(refused.value) and "0" * 64 in str(refused.value) and "prepare" in str(refused.value)


def test_open_refuses_what_is_no_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Tokenizer.open(tmp_path / "absent.model")
    for content, reason in (
        (b"not a model at all", "is not a sentencepiece model"),
        (tokenizer.model[:-100], "is not a sentencepiece model"),
        (b"", r"is empty \(0 bytes\)"),
    ):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            Tokenizer.open(tmp_path / "bad.model")


def test_another_control_piece_may_end_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved = Tokenizer.open(tokenizer.path, eod_token="<pad>").save(tmp_path)
    assert saved.eod_id == Tokenizer.open(tmp_path).eod_id == 3 != tokenizer.eod_id
    for name in ("e", "absent", "<unk>"):
        with pytest.raises(DataError, match=r"is no control piece of .*; it has <s>, </s>, <pad>\."):
            Tokenizer.open(tokenizer.path, eod_token=name)


def test_a_model_without_an_end_needs_the_name_of_one(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_prefix=str(tmp_path / "t"),
        vocab_size=400,
        eos_id=-1,
        control_symbols=["<end>"],
        minloglevel=2,
    )
    with pytest.raises(DataError, match="--eod-token"):
        Tokenizer.open(tmp_path / "t.model")
    named = Tokenizer.open(tmp_path / "t.model", eod_token="<end>")
    assert named.piece(named.eod_id) == "<end>"
    assert named.eod_id not in named.encode("a <end> b")


@pytest.mark.parametrize("texts", [["hello world"], ["日本語の文章です。" * 5], TEXTS])
def test_text_too_small_names_the_largest_size_and_that_size_works(
    texts: list[str], model_type: str, tmp_path: Path
) -> None:
    output = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"largest possible --vocab-size is (\d+)\. Lower --vocab-size") as refused:
        train_tokenizer(texts, 16_000, output, model_type=model_type)
    assert not output.exists()
    largest = int(str(refused.value).split("--vocab-size is ")[1].split(".")[0])
    assert train_tokenizer(texts, largest, output, model_type=model_type).vocab_size == largest
    with pytest.raises(DataError, match=f"largest possible --vocab-size is {largest}"):
        train_tokenizer(texts, largest + 1, output, model_type=model_type)


@pytest.mark.parametrize("vocab_size", [1, 100, 262])
def test_vocabulary_too_small_names_the_smallest_size_and_that_size_works(
    vocab_size: int, model_type: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"^--vocab-size {vocab_size} is too small: .* Raise .* or more") as refused:
        train_tokenizer(["hello world"], vocab_size, tmp_path / "t.model", model_type=model_type)
    smallest = int(str(refused.value).split("alone need ")[1].split(".")[0])
    tokenizer = train_tokenizer(["hello world"], smallest, tmp_path / "t.model", model_type=model_type)
    assert tokenizer.vocab_size == smallest


def test_without_text_there_is_nothing_to_train(model_type: str, tmp_path: Path) -> None:
    for texts in ([], ["", "\n"]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(texts, 300, tmp_path / "t.model", model_type=model_type)
