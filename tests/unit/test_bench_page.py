"""`make bench`: which programs it runs, when it believes them, and that it keeps what was measured by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import run_all

PROGRAM = '''"""Twice two.

More words.
"""
import argparse, json, sys
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
quick = parser.parse_args().quick
print("table")
print(json.dumps({"benchmark": "good", "ratio": 0.5, "quick": quick}))
'''


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "good.py").write_text(PROGRAM)
    (tmp_path / "no_benchmark.py").write_text("print(1)\n")
    (tmp_path / "silent.py").write_text(PROGRAM.replace("print(json", "(json"))
    (tmp_path / "failing.py").write_text(PROGRAM + "sys.exit(3)\n")
    return tmp_path


def test_a_benchmark_is_what_takes_quick(bench: Path) -> None:
    assert list(run_all.benchmarks(bench)) == ["failing", "good", "silent"]
    assert "run_all" not in run_all.benchmarks(run_all.BENCH)
    assert "bare_loop" not in run_all.benchmarks(run_all.BENCH)


def test_a_good_run(bench: Path) -> None:
    outcome = run_all.run(bench / "good.py", quick=True)
    assert outcome.problem is None
    assert (outcome.title, outcome.table) == ("Twice two.", "table\n")
    assert outcome.result == {"benchmark": "good", "ratio": 0.5, "quick": True}
    assert "| good | ratio 0.5, quick True |" in run_all.summary([outcome])


def test_a_run_that_cannot_be_believed(bench: Path) -> None:
    assert run_all.run(bench / "silent.py", quick=False).problem == "silent did not end with a line of JSON"
    assert run_all.run(bench / "failing.py", quick=False).problem == "failing ended with exit code 3"


def test_the_page_keeps_what_was_measured_by_hand(bench: Path) -> None:
    outcome = run_all.run(bench / "good.py", quick=False)
    first = run_all.page([outcome], run_all.NOTHING_BY_HAND)
    edited = first.replace(run_all.NOTHING_BY_HAND, "H200: 42\n\n| a | b |")
    again = run_all.page([outcome], run_all.by_hand(edited))
    assert again == edited
    assert "```text\ntable\n```" in again


def test_a_page_without_markers_is_not_overwritten() -> None:
    with pytest.raises(SystemExit, match="lost its markers"):
        run_all.by_hand("# Benchmarks\n")
