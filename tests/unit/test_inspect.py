"""inspect shows exactly the sample that training reads at that position."""

from __future__ import annotations

import argparse
import inspect as source
import json
from pathlib import Path

import pytest

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.inspect import inspect
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.prepare import TOKENIZER_PATH, prepare
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect")
    text = directory / "text.jsonl"
    blocks = [block for block in source.getsource(argparse).split("\n\n") if block.strip()]
    text.write_text("".join(json.dumps({"text": block}) + "\n" for block in blocks))
    prepare([text], directory / "corpus", vocab_size=500, split=0.2, shard_tokens=997)
    return directory / "corpus"


def test_train_sample_is_the_one_the_order_gives(data_path: Path) -> None:
    corpus = Corpus.open(data_path / "train")
    tokenizer = Tokenizer.open(data_path / TOKENIZER_PATH)
    num_samples = corpus.num_samples(300)
    for position in (0, 3, num_samples + 2):
        _, sample = SampleOrder(num_samples, 9, corpus.digest, 300).sample_id(position)
        start = sample * 300
        lines = inspect(data_path, "train", position, seq_length=300, seed=9).split("\n")
        assert lines[0] == (
            f"train position {position}: epoch {position // num_samples}, sample {sample} of {num_samples}, seed 9"
        )
        files = ", ".join(corpus.files_of(start, start + 301))
        assert lines[1] == f"tokens {start}..{start + 300} of {corpus.num_tokens}, in {files}"
        shown = "\n".join(lines[3:]).split("--- document ")[1:]
        texts = [part.split("\n", 1)[1].removesuffix("\n") for part in shown[:-1]] + [shown[-1].split("\n", 1)[1]]
        tokens = corpus.tokens(start, start + 301).tolist()
        assert "".join(texts) == tokenizer.decode(tokens)
        ended = tokens[:-1].count(corpus.eod_id)
        assert len(texts) == ended + 1 and lines[2].startswith(f"{ended + 1} documents, beginning at 0")
        assert sum("ends here" in part for part in shown) == ended + (tokens[-1] == corpus.eod_id)


def test_a_sample_over_two_shards_names_both(data_path: Path) -> None:
    shown = [inspect(data_path, "train", position, seq_length=300, seed=9).split("\n")[1] for position in range(10)]
    assert any(line.count("shard-") == 2 for line in shown) and any(line.count("shard-") == 1 for line in shown)


def test_valid_is_in_natural_order(data_path: Path) -> None:
    lines = inspect(data_path, "valid", 2, seq_length=50, seed=9).split("\n")
    assert lines[0].startswith("valid position 2: epoch 0, sample 2 of") and lines[0].endswith("natural order")
    assert lines[1].startswith("tokens 100..150 of")


def test_ids_are_listed_with_their_pieces(data_path: Path) -> None:
    corpus = Corpus.open(data_path / "valid")
    tokenizer = Tokenizer.open(data_path / TOKENIZER_PATH)
    listed = inspect(data_path, "valid", 0, seq_length=20, seed=0, show_ids=True).split("--- ids\n")[1].split("\n")
    ids = corpus.tokens(0, 21).tolist()
    assert listed == [f"{place} {token} {tokenizer.piece(token)!r}" for place, token in enumerate(ids)]


@pytest.mark.parametrize(
    ("split", "index", "seq_length", "reason"),
    [
        ("test", 0, 50, "no split test"),
        ("train", -1, 50, "counted from 0"),
        ("train", 0, 0, "at least one token"),
        ("valid", 10**6, 50, "past them"),
        ("train", 0, 10**6, "too short for one sample"),
    ],
)
def test_what_is_not_there_is_refused(data_path: Path, split: str, index: int, seq_length: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        inspect(data_path, split, index, seq_length=seq_length, seed=1)


def test_a_changed_token_is_found_up_to_the_limit(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = data_path / "valid" / "shard-00000.arrow"
    intact = shard.read_bytes()
    changed = bytearray(intact)
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    try:
        with pytest.raises(DataError, match=r"shard-00000\.arrow is damaged: sha256"):
            inspect(data_path, "valid", 0, seq_length=50, seed=1)
        monkeypatch.setattr("megatron_slm.data.inspect.HASH_LIMIT_BYTES", len(intact) - 1)
        assert inspect(data_path, "valid", 0, seq_length=50, seed=1).startswith("valid position 0")
    finally:
        shard.write_bytes(intact)


def test_another_tokenizer_is_refused(data_path: Path) -> None:
    model = data_path / TOKENIZER_PATH
    intact = model.read_bytes()
    model.write_bytes(intact + b"\0")
    try:
        with pytest.raises(DataError, match="the same ids would mean other text"):
            inspect(data_path, "train", 0, seq_length=50, seed=1)
    finally:
        model.write_bytes(intact)
