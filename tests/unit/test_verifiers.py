"""Each verifier on right, wrong and odd answers, and the sandbox against programs that want to stay or to take all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_slm.evaluate.sandbox import Limits, run_tests
from megatron_slm.evaluate.sandboxed import CREATE_RULESET
from megatron_slm.evaluate.verifiers import Unverifiable, last_number, normalised, value_of, verifiers

VERIFIERS = verifiers()
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("10-4", 4),
        ("it is -12", -12),
        ("1,234,567 in all", 1234567),
        ("1,2,3", 3),
        ("x1 = 2.50", Fraction(5, 2)),
        ("3/4", Fraction(3, 4)),
        ("2e-3", Fraction(1, 500)),
        ("1/0", None),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: object) -> None:
    assert last_number(text) == number


def test_a_number_may_have_any_number_of_digits() -> None:
    assert (found := last_number("1" * 9000)) is not None and found % 10**9 == 111_111_111


def test_arithmetic() -> None:
    arithmetic = VERIFIERS["arithmetic"]
    assert arithmetic("First 5, then 42", {"answer": "42"}) == 1.0
    assert arithmetic("42, then 5", {"answer": 42}) == 0.0
    assert arithmetic("no number", {"answer": 42}) == 0.0
    assert arithmetic("= 36", {"expression": "(2 + 4) ** 2"}) == 1.0
    assert arithmetic("100000000000000000001", {"answer": "100000000000000000000"}) == 0.0, "integers are exact"
    assert arithmetic("0.3333333", {"expression": "1/3"}) == 1.0
    assert arithmetic("0.33", {"expression": "1/3"}) == 0.0
    assert arithmetic("0.33", {"expression": "1/3", "tolerance": 0.01}) == 1.0
    for bad in (
        {},
        {"answer": None},
        {"answer": "many"},
        {"expression": "9**9**9"},
        {"expression": "__import__('os')"},
    ):
        with pytest.raises(Unverifiable):
            arithmetic("1", bad)


def test_expressions_are_evaluated_exactly_and_nothing_else_is() -> None:
    assert value_of("7 // 2 - -1 % 3 + 0.1 * 10") == 3 - 2 + 1
    for bad in ("f(1)", "1 if 1 else 2", "2 ** 0.5", "1/0", "(" * 500 + "1" + ")" * 500, "'a' * 9", "x", "True", ""):
        with pytest.raises(Unverifiable):
            value_of(bad)


def test_exact_match_and_its_options() -> None:
    exact = VERIFIERS["exact_match"]
    assert exact(" Paris\n", {"answer": "Paris"}) == 1.0
    assert exact("paris", {"answer": "Paris"}) == 0.0
    assert exact("The  paris!", {"answer": ["x", "Paris"], "normalise": ["case", "punctuation", "articles", "space"]})
    assert exact(" Paris", {"answer": "Paris", "normalise": []}) == 0.0
    assert exact("12", {"answer": 12}) == 1.0
    assert normalised("An  apple, a day", ["articles", "punctuation", "space"]) == "apple day"
    for bad in ({}, {"answer": "x", "normalise": ["rot13"]}, {"answer": "x", "normalise": "case"}):
        with pytest.raises(Unverifiable):
            exact("x", bad)


def test_regex() -> None:
    regex = VERIFIERS["regex"]
    assert regex("I say yes.", {"pattern": "yes|no"}) == 1.0
    assert regex("I say yes.", {"pattern": "yes|no", "full": True}) == 0.0
    assert regex("answer: 3\nanswer: 4", {"pattern": r"answer: (\d)", "answer": 4}) == 1.0
    assert regex("answer: 4\nanswer: 3", {"pattern": r"answer: (\d)", "answer": 4}) == 0.0
    with pytest.raises(Unverifiable, match="no regular expression"):
        regex("x", {"pattern": "("})


def test_required_sections_count_in_their_order() -> None:
    check, wanted = VERIFIERS["format"], {"sections": ["think", "answer"]}
    assert check("<think>a</think>\n<answer>b</answer>", wanted) == 1.0
    assert check("<answer>b</answer><think>a</think>", wanted) == 0.5
    assert check("<think>a</think><answer> </answer>", wanted) == 0.5, "a section without text is none"
    assert check("<think>a", wanted) == 0.0
    assert check("x\nAnswer: 3", {"sections": ["Answer:"]}) == 1.0
    assert check("x Answer: 3", {"sections": ["Answer:"]}) == 0.0
    with pytest.raises(Unverifiable):
        check("x", {"sections": []})


def test_json() -> None:
    check = VERIFIERS["json_valid"]
    assert check('{"a": [1]}', {}) == 1.0
    assert check('So:\n```json\n{"a": 1}\n```\n', {"keys": ["a"]}) == 1.0
    assert check('{"a": 1}', {"keys": ["b"]}) == 0.0
    for bad in ("{", "", "NaN", "[" * 100_000, "{'a': 1}"):
        assert check(bad, {}) == 0.0


def test_unit_tests_run_the_last_block_after_the_setup() -> None:
    check = VERIFIERS["unit_tests"]
    tests = ["assert double(2) == 4", "assert double('a') == 'aa'"]
    assert check(f"First:\n```\nnonsense(\n```\nno:\n{RIGHT}", {"tests": tests}) == 1.0
    assert check(RIGHT, {"tests": "assert double(2) == FOUR", "setup": "FOUR = 5"}) == 0.0
    with pytest.raises(Unverifiable):
        check(RIGHT, {"tests": []})


LEAVING = {
    "exit": "import os; os._exit(0)",
    "leave": "raise SystemExit(0)",
    "memory": "found = bytearray(2**30)",
    "files": "open('a', 'wb').write(bytes(2**25))",
    "outside": "open({outside!r}, 'w')",
    "network": "import socket; socket.create_connection(('127.0.0.1', 22), timeout=1)",
    "kill": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(9)",
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_program_that_leaves_or_takes_too_much_has_not_passed(name: str, tmp_path: Path) -> None:
    if name == "outside" and ctypes.CDLL(None).syscall(CREATE_RULESET, None, 0, 1) < 1:
        pytest.skip("this kernel has no Landlock")
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o777)  # what keeps the program out is the sandbox
    outside = tmp_path / "outside"
    found = run_tests(LEAVING[name].replace("{outside!r}", repr(str(outside))), "", Limits(wall_s=3.0))
    assert not found.passed and found.cause
    assert not outside.exists()


def test_a_program_that_hangs_is_ended_with_all_it_has_started() -> None:
    """It leaves its process group and session, ignores signals, and forks as much as it may."""
    tag = f"sandbox-test-{os.getpid()}"
    program = f"""
import ctypes, os, signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
ctypes.CDLL(None).prctl(15, b"{tag[:15]}", 0, 0, 0)
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        time.sleep(0.01)
"""
    begun = time.monotonic()
    found = run_tests(program, "", Limits(wall_s=0.5, processes=8))
    assert found == (False, "ran longer than 0.5 s") and time.monotonic() - begun < 20.0
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            names.append(path.read_text(errors="replace").strip())
    assert tag[:15] not in names


def test_the_number_of_processes_has_a_limit() -> None:
    counts = """
import os, time
started = 0
for _ in range(30):
    try:
        if os.fork() == 0:
            time.sleep(9)
            os._exit(0)
    except OSError:
        break
    started += 1
assert started < 8, started
"""
    assert run_tests(counts, "", Limits(processes=8)) == (True, "")


def test_the_sandbox_goes_with_who_asked_for_it(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(here)!r})\n"
        "from megatron_slm.evaluate.sandbox import Limits, run_tests\n"
        f"run_tests('import time\\nopen(\"begun\", \"w\")\\ntime.sleep(60)', '', Limits(wall_s=60.0))\n"
    )
    asker = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    tmp_path.chmod(0o755)
    until = time.monotonic() + 20.0
    while not list(tmp_path.glob("sandbox-*/begun")):
        assert time.monotonic() < until and asker.poll() is None
        time.sleep(0.02)
    asker.kill()
    asker.wait()
    while list(tmp_path.glob("sandbox-*")):
        assert time.monotonic() < until, "its directory stays"
        time.sleep(0.02)
