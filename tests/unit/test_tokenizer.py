"""The tokenizer loses nothing, is the same file every time, and is refused when it is another."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import random
from pathlib import Path

import pytest

from megatron_slm.data.tokenizer import EOS_ID, LONGEST_LINE_CHARACTERS, Tokenizer, train_tokenizer
from megatron_slm.errors import DataError

TEXTS = [inspect.getsource(argparse), inspect.getsource(json)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_trained_tokenizer_has_the_size_and_ids_it_was_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert tokenizer.eod_id == EOS_ID == 2
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


def test_training_is_reproducible_and_depends_on_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, 600, tmp_path / "again.model")
    assert again.hash == tokenizer.hash == hashlib.sha256((tmp_path / "again.model").read_bytes()).hexdigest()
    assert train_tokenizer(TEXTS[:1], 600, tmp_path / "other.model").hash != tokenizer.hash


def test_a_very_long_line_and_nul_are_trained_on(tmp_path: Path) -> None:
    line = "alpha beta gamma delta " * (3 * LONGEST_LINE_CHARACTERS // 23) + "\0"
    tokenizer = train_tokenizer([line], 280, tmp_path / "t.model")
    assert len(tokenizer.encode("alpha beta gamma delta")) < 15, "the long line was dropped unread"


def test_open_accepts_the_right_hash_and_refuses_another(tokenizer: Tokenizer) -> None:
    assert Tokenizer.open(tokenizer.path, tokenizer.hash).encode("def f") == tokenizer.encode("def f")
    with pytest.raises(DataError) as refused:
        Tokenizer.open(tokenizer.path, "0" * 64)
    assert tokenizer.hash in str(refused.value) and "0" * 64 in str(refused.value) and "prepare" in str(refused.value)


def test_open_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Tokenizer.open(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        Tokenizer.open(tmp_path / "bad.model")


def test_text_too_small_names_the_largest_size_and_that_size_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"largest possible --vocab-size is (\d+)\. Lower --vocab-size") as refused:
        train_tokenizer(["hello world"], 4096, tmp_path / "t.model")
    largest = int(str(refused.value).split("--vocab-size is ")[1].split(".")[0])
    assert train_tokenizer(["hello world"], largest, tmp_path / "t.model").vocab_size == largest


def test_vocabulary_too_small_names_the_smallest_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Raise --vocab-size to that or more"):
        train_tokenizer(["hello world"], 100, tmp_path / "t.model")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", "\n"], 300, tmp_path / "t.model")
