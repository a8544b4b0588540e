"""The guide to a divergence: its commands exist, its blocks have the form that is printed, its walk fits the source."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_slm import cli
from megatron_slm.config.load import load
from megatron_slm.replay.cause import Cause
from megatron_slm.replay.diff import Comparison, Divergence, Key, steps_text
from megatron_slm.replay.report import compared_text, divergence_text
from megatron_slm.replay.stream import Phase

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "divergence_walk.py"
PAGE = (ROOT / "docs" / "divergence.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def walk() -> ModuleType:
    spec = importlib.util.spec_from_file_location("divergence_walk", PROGRAM)
    assert spec is not None and spec.loader is not None, f"{PROGRAM} is a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules["divergence_walk"] = module
    spec.loader.exec_module(module)
    return module


def blocks() -> dict[str, str]:
    """What the page shows, by mark."""
    return dict(re.findall(r"<!-- walk: (\w+) -->\n```\w*\n(.*?)\n```\n", PAGE, re.DOTALL))


def labels(text: str) -> list[str]:
    """The words in front of a difference's lines, but for what only a bisection says."""
    return [word for word in re.findall(r"^  (\w[\w ]*?)  +\S", text, re.MULTILINE) if word != "compared"]


@pytest.mark.parametrize("command", sorted({*re.findall(r"mslm [a-z][^\n`|#]*", PAGE)}))
def test_commands_and_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()[1:]
    verb = " ".join(words[:2]) if " ".join(words[:2]) in cli.VERBS else words[0]
    assert verb in cli.VERBS, command
    with contextlib.suppress(SystemExit):
        cli.main([*verb.split(), "--help"])
    said = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--") and word not in ("--name", "--record")):
        assert option in said, f"{command}: {option}"


def test_the_changes_of_the_walk_fit_the_source(walk: ModuleType, tmp_path: Path) -> None:
    for change in walk.CHANGES:
        shutil.copytree(ROOT / "parallel", tmp_path / "parallel", dirs_exist_ok=True)
        before = (tmp_path / change.file).read_text()
        walk.apply(change, tmp_path)
        assert (tmp_path / change.file).read_text() != before
    with pytest.raises(SystemExit, match="times, not once"):
        walk.apply(change, tmp_path)


def test_the_configuration_of_the_walk_is_accepted(walk: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(blocks()["config"])
    assert blocks()["config"] == walk.CONFIG.rstrip("\n")
    assert load(tmp_path / "run.yaml").config.parallel.world_size == 4


def test_blocks_are_filled_by_their_marks_alone(walk: ModuleType) -> None:
    assert walk.filled(PAGE, blocks()) == PAGE
    changed = walk.filled(PAGE, {**blocks(), "mended": r"$ \1 other"})
    assert changed.count("\n") < PAGE.count("\n") and r"$ \1 other" in changed
    with pytest.raises(SystemExit, match="has marks for"):
        walk.filled(PAGE, {"diff": ""})


def test_blocks_have_the_form_that_is_printed_today() -> None:
    found = Divergence(18, False, 0, Key(Phase.OPERATION, 0, "aten.exp_.default[0] float32[2]", 0), 1, 0, 1, None, 17)
    why = Cause("code", "because", ())
    assert labels(blocks()["diff"]) == labels(divergence_text(found, why))
    for name in ("diff", "mended"):
        read, frames = map(int, re.findall(r"^  compared  (\d+) of (\d+) ", blocks()[name], re.MULTILINE)[0])
        assert compared_text(Comparison(None, frames, read)) in blocks()[name].splitlines()
    assert f"runs/mine/replay alone has {steps_text(range(41, 121))}, which" in blocks()["mended"]
    bisected = blocks()["bisect"]
    assert labels(bisected)[: len(labels(divergence_text(found, why, "", ("x",))))] == labels(
        divergence_text(found, why, "", ("x",))
    )
    assert re.search(r"^first difference: step \d+, rank \d+", bisected, re.MULTILINE)
    assert "made at   first run: parallel/vocab_loss.py:" in bisected


def test_the_page_names_the_line_that_the_walk_has_changed(walk: ModuleType) -> None:
    assert walk.GUILTY.before.strip() in blocks()["bisect"] and walk.GUILTY.after.strip() in blocks()["bisect"]
    assert blocks()["mended"].splitlines()[2].startswith("equal: ")


def test_the_picture_is_there() -> None:
    (name,) = re.findall(r"!\[[^]]+\]\((.+?)\)", PAGE)
    assert (ROOT / "docs" / name).read_bytes().startswith(b"\x89PNG")
