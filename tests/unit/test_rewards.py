"""Weighted sums of verifiers by name, and processes that judge: what fails, hangs or crashes has no score."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.registry import OF_THE_ROW
from megatron_slm.evaluate.rewards import Part, parts_of, total
from megatron_slm.evaluate.verifier_pool import HOPELESS, VerifierPool
from megatron_slm.evaluate.verifier_process import Asked, serve
from megatron_slm.rollout.config import RolloutConfig

OWN = """
import os, subprocess, sys, time

def length(answer, fields):
    return len(answer) / fields["longest"]

def awkward(answer, fields):
    print("this is no output of the command")
    if answer == "hang":
        subprocess.Popen(["sleep", fields["seconds"]])
        while True:
            pass
    if answer == "crash":
        os._exit(3)
    if answer == "text":
        return "good"
    if answer == "none":
        return None
    return {"nan": float("nan"), "inf": float("inf")}.get(answer, 0.5)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "rewards.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def pool(own: Path) -> Iterator[VerifierPool]:
    names = ["exact_match", "regex", OF_THE_ROW, f"{own}:length", f"{own}:awkward"]
    with VerifierPool(names, workers=2, timeout_s=0.5) as found:
        yield found


def command_lines() -> set[str]:
    """Of every process that runs now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return found


def test_many_answers_are_judged_in_their_order(pool: VerifierPool, own: Path) -> None:
    asked = [Asked(f"{own}:length", "x" * (place % 7), {"longest": 10}) for place in range(300)]
    assert [one.value for one in pool.scores(asked)] == [place % 7 / 10 for place in range(300)]
    assert pool.scores([]) == []


def test_what_fails_has_no_score_and_the_others_have(pool: VerifierPool, own: Path) -> None:
    awkward, slow = f"{own}:awkward", r"(a+)+$"
    asked = [
        Asked(awkward, "hang", {"seconds": f"987.{os.getpid()}"}),
        Asked(awkward, "fine", {}),
        Asked(awkward, "crash", {}),
        Asked(awkward, "nan", {}),
        Asked(awkward, "inf", {}),
        Asked(awkward, "text", {}),
        Asked(awkward, "none", {}),
        Asked("exact_match", "x", {}),
        Asked(f"{own}:length", "x", {}),
        Asked("regex", "a" * 60 + "!", {"pattern": slow}),
        Asked("exact_match", "x", {"answer": "x"}),
    ]
    found = pool.scores(asked)
    causes = ["longer than 0.5 s", "", "ended the process", "no finite number", "no finite number", "ValueError",
              "TypeError", 'no "answer"', "KeyError", "longer than 0.5 s", ""]  # fmt: skip
    for one, cause in zip(found, causes, strict=True):
        assert math.isnan(one.value) == bool(cause) and (cause in one.cause if cause else not one.cause), found
    assert (found[1].value, found[10].value) == (0.5, 1.0)
    time.sleep(0.1)
    assert f"sleep 987.{os.getpid()}" not in command_lines()


def test_a_process_whose_pool_is_gone_before_it_is_ready_ends_without_a_word() -> None:
    ours, theirs = Pipe()
    program = f"from {serve.__module__} import serve; serve({theirs.fileno()}, {os.getpid()}, ['regex'])"
    process = subprocess.Popen([sys.executable, "-c", program], pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE)
    ours.close()
    theirs.close()
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0


def test_a_verifier_that_always_hangs_is_given_up(own: Path) -> None:
    with VerifierPool([f"{own}:awkward", "exact_match"], workers=2, timeout_s=0.05) as pool:
        asked = [Asked(f"{own}:awkward", "hang", {"seconds": "1"})] * 200 + [Asked("exact_match", "x", {"answer": "x"})]
        begun = time.monotonic()
        found = pool.scores(asked)
        assert time.monotonic() - begun < 200 * 0.05 and sum("in a row" in one.cause for one in found) > 100
        assert f"{HOPELESS} times" in found[150].cause and found[-1].value == 1.0


def test_a_sandbox_ends_with_the_process_that_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tmp_path.chmod(0o755)
    fields = {"tests": "pass", "time_limit_s": 60}
    with VerifierPool(["unit_tests"], workers=1, timeout_s=1.0) as pool:
        found = pool.scores([Asked("unit_tests", one, fields) for one in ("while True: pass", "x = 1")])
    assert math.isnan(found[0].value) and found[1].value == 1.0
    until = time.monotonic() + 10.0
    while list(tmp_path.glob("sandbox-*")):
        assert time.monotonic() < until, "the program runs on, or its directory stays"
        time.sleep(0.02)


def test_a_row_names_its_own_verifier_but_no_file(pool: VerifierPool, own: Path) -> None:
    rows = [
        {"verifier": "exact_match", "answer": "b"},
        {"verifier": {"name": "exact_match", "normalise": ["case"]}, "answer": "B"},
        {"verifier": f"{own}:length", "longest": 1},
        {"answer": "b"},
    ]
    found = pool.scores([Asked(OF_THE_ROW, "b", row) for row in rows])
    assert [one.value for one in found[:2]] == [1.0, 1.0]
    assert all(math.isnan(one.value) and "must name one of arithmetic" in one.cause for one in found[2:])


def test_processes_end_with_the_pool(own: Path) -> None:
    pool = VerifierPool(["exact_match"], workers=2, timeout_s=1.0)
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert not any(Path("/proc", str(pid)).exists() for pid in pids) and os.getpid()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("nowhere.py:f", "has no file"), ("{own}:missing", "no function 'missing'"), ("{bad}:f", "ZeroDivisionError")],
)
def test_a_verifier_that_cannot_be_loaded_is_refused(own: Path, tmp_path: Path, name: str, problem: str) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0")
    with pytest.raises(ConfigError, match=problem):
        VerifierPool([name.format(own=own, bad=bad)], workers=1, timeout_s=1.0)


def test_parts_and_their_sum() -> None:
    config = RolloutConfig(
        rewards=("exact_match=2", "lib/own.py:short=-0.5", "verifier"), watched=("arithmetic",), reward_model="runs/rm"
    )
    parts = parts_of(config)
    assert parts == (
        Part("exact_match", "exact_match", 2.0),
        Part("short", "lib/own.py:short", -0.5),
        Part("verifier", "verifier", 1.0),
        Part("arithmetic", "arithmetic", None),
        Part("model", "model", 1.0),
    )
    values = {"exact_match": 1.0, "short": 0.5, "verifier": 0.0, "arithmetic": math.nan, "model": 3.0}
    assert total(values, parts) == 2.0 - 0.25 + 3.0, "what is watched has no part in it"
    assert math.isnan(total({**values, "short": math.nan}, parts))


def test_a_watched_reward_model_is_not_learned_from() -> None:
    config = RolloutConfig(rewards=("exact_match",), watched=("model",), reward_model="runs/rm")
    assert [part.weight for part in parts_of(config)] == [1.0, None]


@pytest.mark.parametrize(
    ("rewards", "watched", "problem"),
    [
        ((), ("regex",), "rollout.rewards is empty"),
        (("regex=x",), (), "NAME=WEIGHT"),
        (("regex=nan",), (), "NAME=WEIGHT"),
        (("regx=1",), (), "did you mean regex"),
        (("regex=1",), ("regex",), "twice"),
        (("model=1",), (), "rollout.reward_model"),
        (("regex=1", "arithmetic=0"), (), "no part of the sum; name it in rollout.watched=arithmetic"),
        (("regex=1",), ("nosuch",), "^rollout.watched: 'nosuch' is no verifier"),
        (("nosuch",), ("regex",), "^rollout.rewards: 'nosuch' is no verifier"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(
    rewards: tuple[str, ...], watched: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        parts_of(RolloutConfig(rewards=rewards, watched=watched))
