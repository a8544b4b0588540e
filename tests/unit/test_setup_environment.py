"""tools/setup_environment.sh refuses what cannot work in one sentence, before it makes anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_environment.sh"


def stub(directory: Path, version: str, *, ensurepip: bool = True) -> Path:
    """A program that answers the script's two questions as a python3 of ``version`` would."""
    program = directory / "python"
    missing = "" if ensurepip else "case $2 in *ensurepip*) exit 1;; esac\n"
    program.write_text(f"#!/bin/sh\n{missing}case $2 in *version_info*) echo {version};; *) exit 9;; esac\n")
    program.chmod(0o755)
    return program


def refusal(directory: Path, python: Path | str, **environ: str) -> str:
    ended = subprocess.run(
        ["bash", str(SCRIPT), str(directory / "venv")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert not (directory / "venv").exists(), "nothing is made"
    return ended.stderr


@pytest.mark.parametrize("version", ["3.9", "3.13", "2.7"])
def test_another_python(tmp_path: Path, version: str) -> None:
    told = refusal(tmp_path, stub(tmp_path, version))
    assert f"Python {version}" in told and "3.10, 3.11 or 3.12" in told and "PYTHON=" in told


def test_no_python(tmp_path: Path) -> None:
    assert "no '/nowhere/python3' on PATH" in refusal(tmp_path, "/nowhere/python3")


def test_a_python_that_cannot_make_environments(tmp_path: Path) -> None:
    told = refusal(tmp_path, stub(tmp_path, "3.11", ensurepip=False))
    assert "no ensurepip" in told and "python3.11-venv" in told


def test_an_unknown_build_of_torch(tmp_path: Path) -> None:
    told = refusal(tmp_path, stub(tmp_path, "3.11"), MSLM_TORCH="rocm")
    assert "MSLM_TORCH is 'rocm'; it is cpu or cuda" in told


def test_a_directory_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    python = stub(tmp_path, "3.11")
    python.write_text(python.read_text().replace("exit 9", "exit 0"))
    ended = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "thesis")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "is no virtual environment" in ended.stderr
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"
