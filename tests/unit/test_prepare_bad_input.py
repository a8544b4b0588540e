"""What goes wrong while a corpus is prepared: one sentence, exit code 2, nothing published, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import main
from megatron_slm.data import prepare as prepare_module
from megatron_slm.data.documents import Source, open_sources

LINES = [json.dumps({"text": f"line {number} of a small text about {number % 7} things"}) for number in range(400)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(LINES))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 256 kB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def refusal(capsys: pytest.CaptureFixture[str], *tokens: str | Path) -> str:
    """What ``mslm data prepare`` says when it ends with 2."""
    capsys.readouterr()
    # The last of two --workers holds: one process, unless the test asks for more.
    assert main(["data", "prepare", "--workers", "1", *map(str, tokens), "--vocab-size", "300"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *notices, message = printed.err.splitlines()
    assert all(notice.startswith("mslm: ") for notice in notices), printed.err
    return message


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if output.name in path.name)


def test_a_file_of_no_bytes(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    message = refusal(capsys, jsonl, tmp_path / "empty.jsonl", "--output", tmp_path / "corpus")
    assert message == f"mslm: {tmp_path}/empty.jsonl is empty (0 bytes). Give a file with text, or leave this one out."
    assert beside(tmp_path / "corpus") == []


def test_a_truncated_gzip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl.gz"
    content = gzip.compress("\n".join(LINES).encode())
    path.write_bytes(content[: len(content) // 2])
    message = refusal(capsys, path, "--output", tmp_path / "corpus")
    assert f"{path} is truncated or damaged" in message and "Copy it anew" in message
    assert beside(tmp_path / "corpus") == []


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write('\n{"text": "one more"}')


@pytest.mark.parametrize(
    ("change", "words"),
    [(append, ("changed while it was read", "run the command again")), (os.unlink, ("No such file", "Check the path"))],
    ids=["changed", "vanished"],
)
def test_a_file_that_is_another_one_when_it_is_read(
    jsonl: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    def open_and_change(inputs: list[Path], *, pattern: str) -> list[Source]:
        sources = open_sources(inputs, pattern=pattern)
        change(jsonl)
        return sources

    monkeypatch.setattr(prepare_module, "open_sources", open_and_change)
    output = jsonl.with_name("corpus")
    message = refusal(capsys, jsonl, "--output", output)
    assert all(word in message for word in (*words, str(jsonl)))
    assert beside(output) == []


def cut(path: Path) -> None:
    path.write_text("\n".join(LINES[:300]))


def shorten(path: Path) -> None:
    path.write_text("\n".join(line.replace(" of a small text", "") for line in LINES))


@pytest.mark.parametrize("reading", ["make_tokenizer", "tokenise"])
@pytest.mark.parametrize("change", [append, cut, shorten])
def test_a_file_that_is_another_one_at_a_later_reading(
    jsonl: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reading: str,
    change: Callable[[Path], None],
) -> None:
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", 2000)
    original = getattr(prepare_module, reading)

    def change_and_read(*arguments: Any) -> Any:
        change(jsonl)
        return original(*arguments)

    monkeypatch.setattr(prepare_module, reading, change_and_read)
    message = refusal(capsys, jsonl, "--output", jsonl.with_name("corpus"))
    assert message.startswith(f"mslm: {jsonl} changed while it was read: it is not the file that was hashed")
    assert beside(jsonl.with_name("corpus")) == []


@pytest.mark.parametrize(
    "tokens",
    [
        ("prepare", "", "--output", "corpus"),
        ("prepare", "text.jsonl", "--output", ""),
        ("prepare", "text.jsonl", "--output", "corpus", "--decontaminate", ""),
        ("verify", ""),
    ],
)
def test_an_empty_path_is_not_the_current_directory(
    tokens: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *tokens]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mslm: A path on the command line is empty") and message.count("\n") == 1


@pytest.mark.parametrize("option", [None, "--decontaminate", "--tokenizer-model"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_refused(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, option: str | None
) -> None:
    path = tmp_path / "endless.txt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    inputs = [path] if option is None else [jsonl, option, path]
    capsys.readouterr()
    assert main(["data", "prepare", *map(str, inputs), "--output", str(tmp_path / "corpus"), "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mslm: {path} is a pipe, a socket or a device") and message.count("\n") == 1
    assert beside(tmp_path / "corpus") == []


@pytest.mark.parametrize("place", ["input", "output", "evaluation"])
def test_a_name_that_is_not_utf_8_is_refused_before_any_work(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    named = tmp_path / os.fsdecode(b"\xff.jsonl")
    shutil.copy(jsonl, named)
    tokens = {
        "input": [named, "--output", tmp_path / "corpus"],
        "output": [jsonl, "--output", tmp_path / os.fsdecode(b"corpus\xff")],
        "evaluation": [jsonl, "--output", tmp_path / "corpus", "--decontaminate", named],
    }
    message = refusal(capsys, *tokens[place])
    assert "\\xff" in message and "is not UTF-8" in message and "Rename it" in message
    assert beside(tmp_path / "corpus") == []


def test_a_file_that_comes_back_is_gone_on_with(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read of the other input is not lost."""
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", 2000)
    away, back = shutil.copy(jsonl, jsonl.with_name("second.jsonl")), jsonl.with_name("away")

    def open_and_move(inputs: list[Path], *, pattern: str) -> list[Source]:
        sources = open_sources(inputs, pattern=pattern)
        os.rename(away, back)
        return sources

    command = [str(jsonl), str(away), "--output", str(jsonl.with_name("corpus")), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "open_sources", open_and_move)
        assert "second.jsonl: No such file" in refusal(capsys, *command)
    kept = list(jsonl.with_name(".corpus.preparing").glob("screen-*.npz"))
    assert len(kept) > 3
    os.rename(back, away)
    assert main(["data", "prepare", *command, "--vocab-size", "300"]) == 0
    assert "another request" not in capsys.readouterr().err
    assert beside(jsonl.with_name("corpus")) == ["corpus"]


def test_a_full_disk_keeps_what_is_finished(
    jsonl: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", 2000)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(150_000))
    message = refusal(capsys, jsonl, "--output", small_disk / "corpus")
    assert f"Cannot write {small_disk}/" in message and "No space left on device" in message
    assert "Free some space and run the same command again" in message
    assert beside(small_disk / "corpus") == [".corpus.preparing"]
    kept = {path.name for path in (small_disk / ".corpus.preparing").glob("*.npz")}
    assert kept
    ballast.unlink()
    assert (
        main(
            [
                "data",
                "prepare",
                str(jsonl),
                "--output",
                str(small_disk / "corpus"),
                "--workers",
                "1",
                "--vocab-size",
                "300",
            ]
        )
        == 0
    )
    assert beside(small_disk / "corpus") == ["corpus"]
    shutil.rmtree(small_disk / "corpus")
    ballast.write_bytes(bytes(1 << 18)[: shutil.disk_usage(small_disk).free - 4096])
    assert "No space left on device" in refusal(capsys, jsonl, "--output", small_disk / "corpus")
    assert beside(small_disk / "corpus") == [], "without anything finished there is nothing to keep"


def test_a_read_only_directory(jsonl: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = refusal(capsys, jsonl, "--output", small_disk / "corpus")
    assert f"Cannot write {small_disk}/corpus: Read-only file system. Choose another output" in message


def test_an_output_under_a_file(jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, jsonl, "--output", jsonl / "corpus")
    assert "Cannot write" in message and "Not a directory" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "0"), "--workers is 0"),
        (("--eod-token", "<end>"), "--eod-token <end> names a token of a finished tokenizer"),
        (("--near-threshold", "0.9"), "--near-threshold 0.9 is of --dedup near"),
        (("--ngram", "5"), "--ngram 5 is of --decontaminate FILE"),
        (("--decontaminate-key", "question"), "--decontaminate-key question is of --decontaminate FILE"),
        (("--min-chars", "100000"), "the train split gets none of the 400 documents (of which 400 are dropped: short)"),
        (("--decontaminate", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_options_that_cannot_be_meant(
    jsonl: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, jsonl, "--output", jsonl.with_name("corpus"), *options)
    assert beside(jsonl.with_name("corpus")) == []
