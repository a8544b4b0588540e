"""The card says what the manifest says, for a reader, and its command makes the corpus again."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.data import card
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.prepare import prepare
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.shards import file_sha256

BLOCKS = [block for block in inspect.getsource(argparse).split("\n\n") if len(block.split()) > 8 and "@" not in block]
TEXTS = list({" ".join(block.split()): block for block in BLOCKS}.values())
PLANTED = "which of the five rivers that rise in these hills reaches the sea first of all"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs with two duplicates, one leak, three e-mail addresses and a short document; two corpora."""
    directory = tmp_path_factory.mktemp("card")
    half = len(TEXTS) // 2
    one = [*TEXTS[:half], TEXTS[3], "short", "write | to a@b.org or c@d.org about this matter at once"]
    two = [*TEXTS[half:], TEXTS[3], f"And now | {PLANTED}, he asked.", "e@f.org is another address to write to today"]
    for name, texts in (("one.jsonl", one), ("two books.jsonl", two)):
        (directory / name).write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (directory / "eval.txt").write_text(PLANTED + "\n")
    (directory / "clean.txt").write_text("a text of which nothing at all is in any of the two books there are\n")
    inputs = [directory / "one.jsonl", directory / "two books.jsonl"]
    options: dict[str, Any] = {"text_key": "body", "vocab_size": 500, "split": 0.1}
    quality = QualityConfig(
        exact_duplicates=True,
        min_characters=6,
        scrub_pii=True,
        leakage_against=(str(directory / "eval.txt"), str(directory / "clean.txt")),
    )
    prepare(inputs, directory / "filtered", **options, quality=quality, licence="CC0-1.0")
    prepare(inputs, directory / "plain", **options)
    return directory


def render(corpus: Path) -> str:
    return card.render(read_manifest(corpus))


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def test_a_card_lies_in_the_corpus_and_follows_from_the_manifest(directory: Path, tmp_path: Path) -> None:
    card.write(tmp_path, read_manifest(directory / "filtered"))
    assert (tmp_path / "card.md").read_text() == render(directory / "filtered")
    assert (directory / "filtered" / "card.md").read_text() == render(directory / "filtered")


def test_sources_with_hash_size_and_licence(directory: Path) -> None:
    rows = section(render(directory / "filtered"), "Sources").split("\n")
    path = directory / "two books.jsonl"
    assert rows[-1].split(" | ")[0] == f"| {path}"
    assert rows[-1].endswith(f"| CC0-1.0 | {file_sha256(path)} |")
    assert f"| {path.stat().st_size:,} |" in rows[-1]
    assert "| not stated |" in section(render(directory / "plain"), "Sources")


def test_what_was_removed_with_counts_and_shares(directory: Path) -> None:
    total = len(TEXTS) + 6
    text = section(render(directory / "filtered"), "Removed documents")
    for reason, count in (("exact duplicate", 2), ("leak:eval.txt", 1), ("short", 1), ("kept", total - 4)):
        assert f"| {reason} | {count} | {count / total:.2%} |" in text
    assert f"{len(TEXTS) // 2} repeats 3 (exact)" in text
    assert "min_characters = 6" in text and "exact_duplicates = True" in text
    assert "No filter was asked for" in section(render(directory / "plain"), "Removed documents")


def test_what_was_scrubbed(directory: Path) -> None:
    assert "| `<EMAIL>` | 3 |" in section(render(directory / "filtered"), "Personal data")
    assert section(render(directory / "plain"), "Personal data") == "Not looked for."


def test_evaluation_files_with_hashes_and_places(directory: Path) -> None:
    text = section(render(directory / "filtered"), "Overlap with evaluation files")
    assert "shared 13 words in a row" in text
    assert f"| eval.txt | 1 | {file_sha256(directory / 'eval.txt')} |" in text
    assert f"| clean.txt | 0 | {file_sha256(directory / 'clean.txt')} |" in text
    assert f"- document {len(TEXTS) + 4}, text 0 of the file: which of the five rivers" in text
    assert section(render(directory / "plain"), "Overlap with evaluation files") == "Not checked."


def test_splits_and_tokenizer(directory: Path) -> None:
    text, manifest = render(directory / "filtered"), read_manifest(directory / "filtered")
    for name, split in manifest["splits"].items():
        row = f"| {name} | {split['num_documents']:,} | {split['num_tokens']:,} | {split['num_characters']:,} |"
        assert f"{row} {split['digest']} |" in section(text, "Content")
    assert "500 pieces) was trained (bpe)" in section(text, "Tokenizer")
    assert manifest["tokenizer"]["hash"] in section(text, "Tokenizer")


@pytest.mark.parametrize("name", ["filtered", "plain"])
def test_the_command_makes_the_corpus_again(
    directory: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = section(render(directory / name), "To make it again").split("```\n")[1]
    typed = shlex.split(block)
    assert typed[:3] == ["mslm", "data", "prepare"]
    # Evaluation files are named without their directory.
    monkeypatch.chdir(directory)
    again = [str(tmp_path / "again") if word == "NEW_DIR" else word for word in typed[1:]]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(again) == 0
    assert read_manifest(tmp_path / "again") == read_manifest(directory / name)


def test_a_name_cannot_break_the_table() -> None:
    assert list(card._table(["a"], [["x | y\nz"]])) == ["| a |", "| --- |", "| x \\| y z |"]


def test_a_given_tokenizer_and_near_duplicates(directory: Path, tmp_path: Path) -> None:
    quality = QualityConfig(near_duplicates=0.7, languages=("en",), max_characters=10_000)
    model = directory / "plain" / "tokenizer" / "tokenizer.model"
    manifest = prepare(
        [directory / "one.jsonl"],
        tmp_path / "corpus",
        text_key="body",
        tokenizer_model=model,
        split=0.0,
        quality=quality,
    )
    text = card.render(manifest)
    assert "was given" in section(text, "Tokenizer")
    assert "Nothing is held out." in section(text, "Content")
    assert "datasketch " in section(text, "Removed documents")
    words = shlex.join(card.command(manifest))
    assert "--tokenizer-model tokenizer/tokenizer.model" in words and "--vocab-size" not in words
    assert "--dedup near --near-threshold 0.7 --max-chars 10000 --language en" in words
