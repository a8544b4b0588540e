"""A Hugging Face tokenizer.json does all that a sentencepiece model does, and no text holds the end of a document."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_slm.data.prepare import prepare
from megatron_slm.data.tokenizer import FACTS_NAME, Tokenizer, find_tokenizer, train_tokenizer
from megatron_slm.data.verify import verify
from megatron_slm.errors import DataError
from megatron_slm.run_generate import text_after

TEXT = inspect.getsource(argparse)
AWKWARD = ["", " ", "\n\n a", " leading", "a\tb\r\nc", "日本語 😀 é", "\0x", "<|endoftext|> in text<|im_end|>", TEXT]


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's: byte-level BPE, trained here."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything that a published file may ask for and a corpus must not have."""
    made = byte_level(["<pad>", "<|endoftext|>"])
    made.add_special_tokens(["<|im_end|>"])
    made.add_tokens(["        "])
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 1)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=8)
    file = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.open(path)


def test_it_is_known_by_its_content(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    renamed = tmp_path / "vocabulary.bin"
    renamed.write_bytes(path.read_bytes())
    assert Tokenizer.open(renamed).kind == tokenizer.kind == "huggingface"
    assert (tokenizer.file_name, tokenizer.eod_id, tokenizer.piece(1)) == ("tokenizer.json", 1, "<|endoftext|>")
    # 600 of the vocabulary, then the two that were added to it.
    assert tokenizer.vocab_size == 602 and tokenizer.piece(600) == "<|im_end|>"
    assert Tokenizer.open(path, tokenizer.hash).hash == tokenizer.hash
    with pytest.raises(DataError, match="prepare the corpus again"):
        Tokenizer.open(path, "0" * 64)


@pytest.mark.parametrize("text", AWKWARD)
def test_decode_undoes_encode_and_special_tokens_in_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 600} & set(ids)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text


def test_an_added_token_that_is_not_special_is_a_piece_like_any_other(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("x        y")[1] == 601


@pytest.mark.parametrize("num_threads", [1, 2])
def test_batches_threads_and_pickles_change_nothing(tokenizer: Tokenizer, num_threads: int) -> None:
    expected = [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.encode_batch(AWKWARD, num_threads=num_threads) == expected
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(AWKWARD, num_threads=num_threads) == expected


def test_a_word_that_is_also_a_special_token_is_the_piece_it_would_be_without(tmp_path: Path) -> None:
    byte_level(["</s>", "return"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    for same in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert [same.piece(token) for token in same.encode(" return")] == ["Ġreturn"]


def test_text_generated_token_by_token_is_the_text(tokenizer: Tokenizer) -> None:
    text = "def f() -> str:\n    return '日本語 😀'\n"
    prompt, rest = tokenizer.encode(text)[:5], tokenizer.encode(text)[5:]
    assert tokenizer.decode(prompt) + "".join(text_after(tokenizer, prompt, rest)) == text


def test_a_vocabulary_that_finds_special_tokens_in_text_encodes_their_spelling_apart(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    made.train_from_iterator(
        [TEXT, "</s>"],
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.save(str(tmp_path / "tokenizer.json"))
    assert 1 in made.encode("a </s> b", add_special_tokens=False).ids, "the package has stopped doing it"
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.eod_id == 1
    for text in ("a </s> b</s>", "</s>" * 3000, "</s"):
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text] * 2, num_threads=2)):
            assert 1 not in ids
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    # What is unknown stays unknown.
    assert 0 in tokenizer.encode("日")


@pytest.mark.parametrize(
    ("special", "expected"),
    [(["</s>", "<s>"], "</s>"), (["<|eot_id|>", "<|end_of_text|>"], "<|end_of_text|>"), (["[SEP]"], "[SEP]")],
)
def test_the_end_of_a_document_is_found_by_its_name(tmp_path: Path, special: list[str], expected: str) -> None:
    byte_level(special).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.piece(tokenizer.eod_id) == expected


def test_an_unknown_end_is_named_by_the_user_and_kept_with_the_file(tmp_path: Path) -> None:
    given, kept = tmp_path / "given", tmp_path / "kept"
    given.mkdir()
    byte_level(["<a>", "<b>"]).save(str(given / "tokenizer.json"))
    with pytest.raises(DataError, match=r"it has <a>, <b>\. Name one with --eod-token"):
        Tokenizer.open(given)
    with pytest.raises(DataError, match=r"--eod-token is <c>, which is no special token of .*it has <a>, <b>"):
        Tokenizer.open(given, eod_token="<c>")
    saved = Tokenizer.open(given, eod_token="<b>").save(kept, trained_on=None)
    assert saved.eod_id == Tokenizer.open(kept).eod_id == pickle.loads(pickle.dumps(saved)).eod_id == 1
    assert json.loads((kept / FACTS_NAME).read_text()) == {
        "kind": "huggingface",
        "vocab_size": 600,
        "eod_id": 1,
        "eod_token": "<b>",
        "sha256": saved.hash,
        "trained_on": None,
    }
    (kept / FACTS_NAME).write_text("{")
    with pytest.raises(DataError, match=r"facts\.json is damaged"):
        Tokenizer.open(kept)


def test_the_directory_of_a_model_names_its_tokenizer(path: Path, tmp_path: Path) -> None:
    assert find_tokenizer(path.parent) == path
    with pytest.raises(DataError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    train_tokenizer([TEXT], 400, tmp_path / "tokenizer.model")
    assert Tokenizer.open(tmp_path).kind == "sentencepiece"


@pytest.mark.parametrize("content", [b"{}", b'{"vocab_size": 512}', b'{"version": "1.0", "mod', b'{"a": "\xff"}'])
def test_what_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer\.json"):
        Tokenizer.open(tmp_path / "tokenizer.json")


def test_without_the_package_one_sentence_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Python calls a module that may not be imported.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install megatron-slm\[data\]"):
        Tokenizer.open(path)


def test_what_lies_beside_a_published_file_travels_with_it(path: Path, tmp_path: Path) -> None:
    published, first, second = (tmp_path / name for name in ("published", "first", "second"))
    published.mkdir()
    (published / "tokenizer.json").write_bytes(path.read_bytes())
    train_tokenizer([TEXT], 400, published / "tokenizer.model")
    (published / "chat_template.jinja").write_text("{{ messages }}")
    (published / "model.safetensors").write_text("weights")
    kept = Tokenizer.open(published / "tokenizer.json").save(first).save(second)
    assert [file.name for file in kept.companions()] == ["chat_template.jinja", "tokenizer.model"]
    # The sentencepiece file has come along, and is not taken for the tokenizer.
    assert Tokenizer.open(second).hash == Tokenizer.open(path).hash
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    prepare([text], tmp_path / "corpus", tokenizer_model=published / "tokenizer.json")
    prepared = Tokenizer.open(tmp_path / "corpus" / "tokenizer")
    assert [file.name for file in prepared.companions()] == ["chat_template.jinja", "tokenizer.model"]
    assert verify(tmp_path / "corpus").problems == []
