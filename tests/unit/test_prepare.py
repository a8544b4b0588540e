"""prepare publishes a complete corpus or nothing, loses no document, and does the same work only once."""

from __future__ import annotations

import argparse
import fcntl
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.documents import in_valid, open_sources, read_documents
from megatron_slm.data.prepare import TOKENIZER_PATH, prepare
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

FUNCTIONS = [block for block in inspect.getsource(argparse).split("\n\n") if block.strip()]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in FUNCTIONS))
    return path


def run(inputs: list[Path], output: Path, **options: Any) -> dict[str, Any]:
    return prepare(inputs, output, **{"vocab_size": 500, "split": 0.1, **options})


def documents_of(output: Path, split: str) -> list[str]:
    corpus = Corpus.open(output / split, verify="hash")
    tokenizer = Tokenizer.open(output / TOKENIZER_PATH, corpus.tokenizer_hash)
    tokens = corpus.tokens(0, corpus.num_tokens).tolist()
    texts, begin = [], 0
    for place, token in enumerate(tokens):
        if token == corpus.eod_id:
            texts.append(tokenizer.decode(tokens[begin:place]))
            begin = place + 1
    assert begin == len(tokens), "the stream ends with a document"
    return texts


def left_beside(output: Path) -> list[str]:
    return [path.name for path in output.parent.iterdir() if output.name in path.name]


def test_every_document_comes_back_in_exactly_one_split(jsonl: Path, tmp_path: Path) -> None:
    result = run([jsonl], tmp_path / "corpus", seed=7, shard_tokens=1000)
    for split in ("train", "valid"):
        expected = [text for number, text in enumerate(FUNCTIONS) if in_valid(7, number, 0.1) == (split == "valid")]
        assert documents_of(tmp_path / "corpus", split) == expected
        facts = result["splits"][split]
        assert facts["num_documents"] == len(expected)
        assert facts["num_characters"] == sum(map(len, expected))
    assert result["splits"]["train"]["num_shards"] > 3
    assert not result["already_prepared"]
    assert left_beside(tmp_path / "corpus") == ["corpus"]


def test_chunks_and_dropped_documents_change_nothing_for_the_others(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents keep the number they were read with, which assigns their split."""
    quality = QualityConfig(min_characters=100)
    whole = run([jsonl], tmp_path / "whole", quality=quality)
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", 5000)
    cut = run([jsonl], tmp_path / "cut", quality=quality)
    assert cut == whole
    for split in ("train", "valid"):
        kept = [(number, text) for number, text in enumerate(FUNCTIONS) if len(text) >= 100]
        expected = [text for number, text in kept if in_valid(1234, number, 0.1) == (split == "valid")]
        assert documents_of(tmp_path / "cut", split) == expected
    assert cut["dropped"] == {"short": sum(len(text) < 100 for text in FUNCTIONS)}


def test_the_tokenizer_is_trained_on_the_train_split_alone(jsonl: Path, tmp_path: Path) -> None:
    first = run([jsonl], tmp_path / "first")
    changed = [text.upper() if in_valid(1234, number, 0.1) else text for number, text in enumerate(FUNCTIONS)]
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in changed))
    second = run([jsonl], tmp_path / "second")
    assert first["tokenizer"]["hash"] == second["tokenizer"]["hash"]
    assert first["splits"]["train"]["digest"] == second["splits"]["train"]["digest"]
    assert first["splits"]["valid"]["digest"] != second["splits"]["valid"]["digest"]


def test_a_large_train_split_gives_the_tokenizer_a_share_of_its_documents(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run([jsonl], tmp_path / "whole")
    monkeypatch.setattr(
        "megatron_slm.data.preparation.tokenising.TOKENIZER_TRAINING_CHARACTERS",
        whole["splits"]["train"]["num_characters"] // 2,
    )
    part = run([jsonl], tmp_path / "part")
    assert part["tokenizer"]["hash"] != whole["tokenizer"]["hash"]
    assert part["splits"]["train"]["num_documents"] == whole["splits"]["train"]["num_documents"]
    facts = json.loads((tmp_path / "part" / "tokenizer" / "facts.json").read_text())
    assert facts["trained_on"] == "0.500 of the train split's documents"
    assert run([jsonl], tmp_path / "again")["tokenizer"] == part["tokenizer"]


def test_the_index_says_where_the_text_came_from(jsonl: Path, tmp_path: Path) -> None:
    run([jsonl], tmp_path / "corpus", licence="PSF-2.0")
    (source,) = Corpus.open(tmp_path / "corpus" / "train").sources
    assert source == {
        "name": "text.jsonl",
        "path": str(jsonl),
        "kind": "jsonl",
        "sha256": open_sources([jsonl])[0].sha256,
        "bytes": jsonl.stat().st_size,
        "files": 1,
        "files_skipped": 0,
        "pattern": None,
        "licence": "PSF-2.0",
        "documents": len(FUNCTIONS),
        "kept": len(FUNCTIONS),
        "dropped": {},
        "scrubbed": {},
    }
    with pytest.raises(DataError, match="another corpus: licence is PSF-2.0 there, None was asked for"):
        run([jsonl], tmp_path / "corpus")


def test_a_given_tokenizer_is_taken(jsonl: Path, tmp_path: Path) -> None:
    first = run([jsonl], tmp_path / "first")
    model = tmp_path / "first" / TOKENIZER_PATH
    second = run([jsonl], tmp_path / "second", vocab_size=None, tokenizer_model=model)
    assert first["splits"] == second["splits"]
    assert (tmp_path / "second" / TOKENIZER_PATH).read_bytes() == model.read_bytes()
    with pytest.raises(DataError, match="--vocab-size and --tokenizer-model are both given"):
        run([jsonl], tmp_path / "third", tokenizer_model=model)


def test_equal_request_is_already_prepared_and_another_is_refused_by_name(jsonl: Path, tmp_path: Path) -> None:
    first = run([jsonl], tmp_path / "corpus")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    again = run([jsonl], tmp_path / "corpus")
    assert again == {**first, "already_prepared": True}
    with pytest.raises(DataError, match=r"another corpus: vocab_size is 500 there, 510 was asked for\. Choose"):
        run([jsonl], tmp_path / "corpus", vocab_size=510)
    jsonl.write_text(jsonl.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(DataError, match=r"another corpus: the input .*\.jsonl has changed since\. Choose"):
        run([jsonl], tmp_path / "corpus")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}


def test_a_corpus_inside_its_own_input_is_already_prepared(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number, text in enumerate(FUNCTIONS):
        (tree / f"{number}.md").write_text(text)
    run([tree], tree / "corpus", pattern="**/*.md")
    assert run([tree], tree / "corpus", pattern="**/*.md")["already_prepared"]


def test_other_inputs_are_refused_by_name(jsonl: Path, tmp_path: Path) -> None:
    run([jsonl], tmp_path / "corpus")
    other = tmp_path / "other.jsonl"
    other.write_text(jsonl.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(
        DataError, match=r"corpus: input 1 was .*/text\.jsonl, .*/other\.jsonl holds something else\. Ch"
    ):
        run([other], tmp_path / "corpus")
    with pytest.raises(DataError, match=r"corpus: it is of 1 inputs, 2 were given\. Choose"):
        run([jsonl, other], tmp_path / "corpus")


def test_a_damaged_corpus_is_not_called_prepared(jsonl: Path, tmp_path: Path) -> None:
    run([jsonl], tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match="bytes, but the index promises"):
        run([jsonl], tmp_path / "corpus")


def test_a_corpus_with_changed_tokens_is_not_called_prepared(jsonl: Path, tmp_path: Path) -> None:
    run([jsonl], tmp_path / "corpus")
    shard = tmp_path / "corpus" / "valid" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"valid/shard-00000\.arrow is damaged: sha256"):
        run([jsonl], tmp_path / "corpus")


@pytest.mark.parametrize("kind", ["file", "empty", "full"])
def test_what_lies_at_the_output_is_kept(jsonl: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("precious")
    else:
        output.mkdir()
    if kind == "full":
        (output / "data").write_text("precious")
    with pytest.raises(DataError, match="exists and is no prepared corpus"):
        run([jsonl], output)
    assert output.is_file() or [path.name for path in output.iterdir()] == (["data"] if kind == "full" else [])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"body": "x"}\n',
            r"a\.jsonl:2 has no string under \"text\"; its keys are \['body'\]\. Name the right key with --text-key",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1 has no string"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 has no string under \"text\"; it is no object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": ""}\n\n', "hold no document"),
        ("a.txt", b"caf\xe9\n", r"a\.txt is not UTF-8"),
        ("a.csv", b"x", r"must end in \.jsonl, \.txt"),
    ],
)
def test_bad_input_is_refused_and_nothing_remains(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        run([tmp_path / name], tmp_path / "corpus")
    assert left_beside(tmp_path / "corpus") == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split": 1.0}, "--split is 1.0"),
        ({"split": -0.1}, "--split is -0.1"),
        ({"text_unit": "line"}, "--text-unit is line"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"vocab_size": 10**6}, "largest possible --vocab-size is"),
        ({"vocab_size": 0}, "--vocab-size is 0, but .* 261 pieces"),
        ({"vocab_size": -5}, "--vocab-size is -5, but"),
        ({"vocab_size": 3}, "--vocab-size is 3, but"),
        ({"vocab_size": 10**10}, "--vocab-size is 10000000000, but"),
        ({"vocab_size": 261}, "--vocab-size 261 is too small.*Raise --vocab-size to that or more"),
        ({"split": 1e-9}, "the valid split gets none.*change --split"),
    ],
)
def test_values_out_of_range_are_refused(jsonl: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        run([jsonl], tmp_path / "corpus", **options)
    assert left_beside(tmp_path / "corpus") == []
    with pytest.raises(DataError, match="No input file"):
        run([], tmp_path / "corpus", **options)
    with pytest.raises(DataError, match="No such file"):
        run([tmp_path / "absent.txt"], tmp_path / "corpus")


def test_split_zero_makes_no_valid_split(jsonl: Path, tmp_path: Path) -> None:
    assert list(run([jsonl], tmp_path / "corpus", split=0.0)["splits"]) == ["train"]
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "card.md",
        "manifest.json",
        "tokenizer",
        "train",
    ]


def test_text_files_are_paragraphs_or_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\n  two\n\n \t\n\nthree\n", newline="")
    texts = {
        unit: list(read_documents(open_sources([path])[0], text_key="text", text_unit=unit))
        for unit in ("paragraph", "file")
    }
    assert texts == {"paragraph": ["one\n  two", "three"], "file": [path.read_text()]}


def test_the_split_of_a_document_does_not_depend_on_what_follows() -> None:
    chosen = [number for number in range(20_000) if in_valid(5, number, 0.05)]
    assert abs(len(chosen) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    assert chosen != [number for number in range(20_000) if in_valid(6, number, 0.05)]
    assert set(chosen) <= {number for number in range(20_000) if in_valid(5, number, 0.06)}


def test_two_at_once_do_not_disturb_each_other(jsonl: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".corpus.preparing"
    staging.mkdir()
    (staging / "work").write_text("of the other process")
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="Another process is preparing"):
        run([jsonl], tmp_path / "corpus")
    assert (staging / "work").exists()
    os.close(descriptor)
    run([jsonl], tmp_path / "corpus")
    assert left_beside(tmp_path / "corpus") == ["corpus"]
