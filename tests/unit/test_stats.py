"""stats counts what is in the shards, whatever they are cut into."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data import stats
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.prepare import prepare
from megatron_slm.data.shards import ShardWriter
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

TEXTS = [block for block in inspect.getsource(argparse).split("\n\n") if block.strip()]


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": block + " \u2603"}) + "\n" for block in TEXTS))
    # The snow man is in no training text: bytes spell it.
    model = directory / "corpus" / "tokenizer" / "tokenizer.model"
    plain = directory / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": block}) + "\n" for block in TEXTS))
    prepare([plain], directory / "corpus", vocab_size=500, split=0.0)
    prepare([text], directory / "snow", tokenizer_model=model, split=0.2, shard_tokens=997)
    return directory / "snow"


def figures(described: str) -> dict[str, float]:
    """The first number after each name at the beginning of a line."""
    found = {}
    for line in described.split("\n"):
        name, number = line[:24].strip(), line[24:40].strip().replace(",", "")
        if line[:1].isalpha() and number.replace(".", "").isdigit():
            found[name] = float(number)
    return found


def test_the_numbers_are_those_of_the_tokens(data_path: Path) -> None:
    corpus, tokenizer = Corpus.open(data_path / "train"), Tokenizer.open(data_path / "tokenizer")
    tokens = corpus.tokens(0, corpus.num_tokens).tolist()
    characters = json.loads((data_path / "manifest.json").read_text())["splits"]["train"]["num_characters"]
    described = stats.describe(data_path, "train")
    spelt = sum(tokenizer.piece(token).startswith("<0x") for token in tokens)
    assert spelt >= 3 * corpus.num_documents, "each snow man is three bytes"
    assert figures(described) == {
        "documents": tokens.count(corpus.eod_id),
        "tokens": len(tokens),
        "characters": characters,
        "tokens a character": round((len(tokens) - tokens.count(corpus.eod_id)) / characters, 4),
        "vocabulary": 500,
        "byte-fallback pieces": spelt,
    }
    body = [token for token in tokens if token != corpus.eod_id]
    assert f"{len(set(body)):,} pieces occur" in described
    commonest = max(sorted(set(body)), key=body.count)
    first = described.split("most frequent pieces")[1].split("\n")[1].split()
    assert first[0] == f"{body.count(commonest):,}" and first[2] == str(commonest)
    assert described.split("\n")[-1].endswith("'") and repr(tokenizer.piece(commonest)) in described


@pytest.mark.parametrize("read_tokens", [1, 7, 1 << 22])
def test_lengths_do_not_depend_on_the_pieces_it_is_read_in(
    data_path: Path, read_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open(data_path / "valid")
    tokens, expected = corpus.tokens(0, corpus.num_tokens).tolist(), [0]
    for token in tokens:
        if token == corpus.eod_id:
            expected.append(0)
        else:
            expected[-1] += 1
    monkeypatch.setattr(stats, "READ_TOKENS", read_tokens)
    counts = stats.count(corpus)
    assert counts.lengths.tolist() == expected[:-1]
    assert counts.pieces.sum() == sum(expected) and counts.pieces[corpus.eod_id] == 0


def test_lengths_and_histogram(tmp_path: Path) -> None:
    lengths = [0, 1, 2, 3, 3, 4, 100, 1000]
    with ShardWriter(tmp_path, vocab_size=10, eod_id=2, tokenizer_hash="x", shard_tokens=50) as writer:
        for length in lengths:
            writer.add_document([5] * length)
    counts = stats.count(Corpus.open(tmp_path))
    assert counts.lengths.tolist() == lengths
    names, values = (line.split() for line in stats._lengths(counts.lengths))
    quartiles = [f"{value:,.0f}" for value in np.percentile(lengths, (0, 25, 50, 75, 99, 100))]
    assert dict(zip(names, values, strict=True)) == dict(
        zip(["min", "25%", "median", "75%", "99%", "max", "mean"], [*quartiles, "139"], strict=True)
    )
    bars = [line.split() for line in stats._histogram(counts.lengths)]
    assert [[*bar[:3], bar[3]] for bar in bars[:4]] == [
        ["0", "..", "0", "1"],
        ["1", "..", "1", "1"],
        ["2", "..", "3", "3"],
        ["4", "..", "7", "1"],
    ]
    assert bars[2][4] == "#" * stats.BAR_CHARACTERS and bars[-1][:4] == ["512", "..", "1,023", "1"]
    assert sum(int(bar[3]) for bar in bars) == len(lengths)


def test_what_is_damaged_or_absent_is_refused(data_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Give the directory that"):
        stats.describe(tmp_path, "train")
    with pytest.raises(DataError, match="not a prepared split"):
        stats.describe(data_path, "test")
    shard = data_path / "valid" / "shard-00000.arrow"
    intact = shard.read_bytes()
    shard.write_bytes(intact.replace(intact[600:602], b"\xff\xff", 1))
    try:
        with pytest.raises(DataError, match="is damaged"):
            stats.describe(data_path, "valid")
    finally:
        shard.write_bytes(intact)


def test_an_id_outside_the_vocabulary_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path, vocab_size=100, eod_id=2, tokenizer_hash="x") as writer:
        writer.add_document([5, 99])
    corpus = Corpus.open(tmp_path)
    corpus.vocab_size = 50
    with pytest.raises(DataError, match=r"its ids are 2\.\.99, but its vocabulary has 50 pieces"):
        stats.count(corpus)
