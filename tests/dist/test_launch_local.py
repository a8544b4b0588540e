"""``run_local`` with real processes: four ranks that work, die in every way, are refused, and are asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.breadth import BREADTH, widely

PROGRAM = Path(__file__).with_name("launch_program.py")
WORLD_SIZE = 4
# Long enough for any machine; a test that waits this long has failed.
PATIENCE_S = 120.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the program in a process group of its own, as a terminal would; kill what a failed test leaves."""
    started: list[subprocess.Popen[str]] = []

    def start_program(behaviour: str, *options: str, **variables: str) -> subprocess.Popen[str]:
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_", "OMPI_", "SLURM_", "MSLM_")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
        environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
        started.append(
            subprocess.Popen(
                [sys.executable, str(PROGRAM), behaviour, str(tmp_path), *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environ,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start_program
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen"
        time.sleep(0.02)


def all_stepping(directory: Path) -> bool:
    return len(list(directory.glob("*.stepping"))) == WORLD_SIZE


def survivors(directory: Path) -> list[int]:
    """What still lives of the run, or is a zombie: the ranks by id, and anything given the directory's name."""
    ranks = [int(file.read_text()) for file in directory.glob("rank*.pid")]
    assert len(ranks) == WORLD_SIZE, f"every rank started: {ranks}"
    named = [
        process.pid for process in psutil.process_iter(["cmdline"]) if str(directory) in (process.info["cmdline"] or [])
    ]
    return [pid for pid in ranks if psutil.pid_exists(pid)] + named


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("options", [(), ("--fresh",)], ids=["warm", "fresh"])
def test_four_ranks_meet_and_sum(start: Callable[..., subprocess.Popen[str]], options: tuple[str, ...]) -> None:
    code, stdout, stderr = end_of(start("sum", *options))
    assert code == 0, f"the ranks work: {stderr}"
    assert sorted(stdout.splitlines()) == [f"rank {rank} got 6" for rank in range(4)], "0 + 1 + 2 + 3 on each rank"


@pytest.mark.parametrize(
    ("behaviour", "options", "message", "frame"),
    [
        ("raise", (), "ValueError: the loss is not a number", "in fail_with_others_waiting"),
        pytest.param(
            "raise", ("--fresh",), "ValueError: the loss is not a number", "in fail_with_others_waiting", marks=BREADTH
        ),
        ("raise_after_teardown", (), "ValueError: the loss is not a number", "in fail_with_others_waiting"),
        pytest.param("exit3", (), "exited with code 3 in the middle of its work", "", marks=BREADTH),
        ("exit0", (), "exited with code 0 in the middle of its work", ""),
        ("sigkill", (), "killed by signal 9 (SIGKILL): out of memory?", ""),
        pytest.param("sigkill", ("--fresh",), "killed by signal 9 (SIGKILL): out of memory?", "", marks=BREADTH),
        ("segfault", (), "killed by signal 11 (SIGSEGV)", "in fail_with_others_waiting"),
        ("ignore", (), "ValueError: the loss is not a number", "in entry"),
    ],
)
def test_dead_rank_ends_the_run_and_is_named(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    behaviour: str,
    options: tuple[str, ...],
    message: str,
    frame: str,
) -> None:
    code, _, stderr = end_of(start(behaviour, *options))
    seconds = time.monotonic() - float((tmp_path / "death").read_text())
    assert code == 1, f"a dead rank is a failure: {stderr}"
    assert seconds < 10.0, f"the run ends within 10 s of the death, not {seconds:.1f} s"
    assert f"mslm: rank 2 of 4 died: {message}" in stderr, f"the culprit is named with its reason: {stderr}"
    assert stderr.count(" died: ") == 1, f"the others' broken connections are not reported: {stderr}"
    assert frame in stderr, f"where it happened is shown: {stderr}"
    assert survivors(tmp_path) == [], "nothing is left, not even what a rank had started"


def test_input_refused_by_all_ranks_is_said_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, _, stderr = end_of(start("refuse_all"))
    assert (code, stderr) == (2, "mslm: the corpus corpus.jsonl does not exist; give data.train\n"), (
        "once, no traceback"
    )


def test_input_refused_by_one_rank_ends_the_run(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, _, stderr = end_of(start("refuse_one"))
    assert (code, stderr) == (2, "mslm: the corpus corpus.jsonl does not exist; give data.train\n"), (
        "the others are ended"
    )
    assert survivors(tmp_path) == [], "nothing is left"


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        pytest.param("0,0,0,0", 0, "", marks=BREADTH),
        pytest.param("75,75,75,75", 75, "", marks=BREADTH),
        ("16,16,16,16", 16, ""),
        ("0,75,0,0", 1, "the ranks disagree about how the run ended (exit codes rank 0: 0, rank 1: 75"),
    ],
)
def test_codes_of_the_ranks(start: Callable[..., subprocess.Popen[str]], codes: str, expected: int, said: str) -> None:
    code, _, stderr = end_of(start("codes", CODES=codes))
    assert code == expected and said in stderr, f"ranks returned {codes}: {stderr}"


@pytest.mark.parametrize(
    ("number", "to_group", "options"),
    [
        pytest.param(signal.SIGTERM, False, (), id="TERM", marks=BREADTH),
        pytest.param(signal.SIGTERM, True, (), id="TERM to all"),
        pytest.param(signal.SIGUSR1, False, (), id="USR1", marks=BREADTH),
        pytest.param(signal.SIGUSR1, True, (), id="USR1 to all"),
        pytest.param(signal.SIGINT, True, (), id="Ctrl-C"),
        pytest.param(signal.SIGINT, True, ("--fresh",), id="Ctrl-C fresh", marks=BREADTH),
    ],
)
def test_stop_signal_saves_and_returns_75(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    number: signal.Signals,
    to_group: bool,
    options: tuple[str, ...],
) -> None:
    process = start("steps", *options)
    wait_until(lambda: all_stepping(tmp_path), "the first step")
    (os.killpg if to_group else os.kill)(process.pid, number)
    code, _, stderr = end_of(process)
    assert code == 75, f"stopped after a clean save: {stderr}"
    assert len(list(tmp_path.glob("*.saved"))) == WORLD_SIZE, "every rank saved"
    assert f"mslm: {number.name}: the ranks finish their step" in stderr, "the user sees that it was heard"
    assert "Traceback" not in stderr, f"nobody died: {stderr}"
    assert survivors(tmp_path) == [], "nothing is left"


@pytest.mark.parametrize(
    "number",
    widely([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], signal.SIGINT),
    ids=["TERM", "Ctrl-C", "USR1 to all"],
)
def test_stop_signal_before_the_first_step_ends_the_ranks(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    process = start("outside")
    wait_until(lambda: all_stepping(tmp_path), "the start")
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    code, _, stderr = end_of(process)
    assert code == 75, f"a requeued job takes up its last checkpoint: {stderr}"
    assert f"stopped by {number.name} outside the training loop" in stderr, "and the reason is said"
    assert stderr.count("the ranks finish their step") == 1, f"by the parent alone: {stderr}"


def test_second_ctrl_c_kills_ranks_that_do_not_stop(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("deaf")
    wait_until(lambda: all_stepping(tmp_path), "the start")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "the first Ctrl-C waits for the ranks"
    os.killpg(process.pid, signal.SIGINT)
    code, _, stderr = end_of(process)
    assert code == 1 and "killed by a second Ctrl-C" in stderr, f"at once: {stderr}"
    assert survivors(tmp_path) == [], "nothing is left"


@pytest.mark.parametrize("options", widely([(), ("--fresh",)], ()), ids=["warm", "fresh"])
def test_ranks_die_with_a_killed_parent(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, options: tuple[str, ...]
) -> None:
    process = start("steps", *options)
    wait_until(lambda: all_stepping(tmp_path), "the first step")
    process.kill()
    process.wait()
    wait_until(lambda: survivors(tmp_path) == [], "the end of the ranks")
    assert survivors(tmp_path) == []
