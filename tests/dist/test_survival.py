"""``mslm train`` when ranks stop, stand still, are slow, die or lose each other: named in time, and gone on from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_slm.survival.attempts import read_attempts
from megatron_slm.survival.restart import read_ends
from tests import runs
from tests.breadth import BREADTH, widely

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("survival_program.py")
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
ENDLESS = ("train.train_iters=100000", "train.eval_iters=0", "log.tensorboard=false")
HANG_S = 8.0
HANG = f"parallel.hang_timeout_minutes={HANG_S / 60:.4f}"
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def start(run: Path, data: Path, *overrides: str, fault: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    program = [str(PROGRAM), *fault] if fault else ["-m", "megatron_slm.cli"]
    given = [item for item in overrides if not item.startswith("--")]
    options = [word for item in overrides if item.startswith("--") for word in item.split()]
    return subprocess.Popen(
        [sys.executable, *program, "train", *runs.given(run, data, *given), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, errors


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def rank_process(parent: subprocess.Popen[str], rank: int) -> int:
    """Ranks are the parent's children in the order in which they were forked."""
    children = sorted(psutil.Process(parent.pid).children(), key=lambda child: (child.create_time(), child.pid))
    return children[rank].pid


def events(run: Path, name: str) -> list[str]:
    """What progress.txt keeps of one kind of event."""
    fields = [line.split("\t") for line in (run / "progress.txt").read_text().splitlines()]
    return [line[4] for line in fields if line[3] == name]


def test_a_stopped_rank_is_named_with_what_it_blocks(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "stopped"
    job = start(run, data, TP2, PP2, HANG, *ENDLESS)
    wait_for(lambda: steps_of(run) >= 3, "training")
    victim = rank_process(job, 2)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    code, _, errors = finish(job)
    assert code == 1, f"a hung job has failed: {errors}"
    assert time.monotonic() - stopped < HANG_S + 15.0, "within the watchdog's time, and what it takes to end ranks"
    cause = errors.split("mslm: hang: ")[1].splitlines()[0]
    assert re.search(rf"rank 2 says nothing \(.*process {victim}: stopped by a signal", cause), f"named: {cause}"
    assert "rank 3" in errors, "and who waits for whom"
    assert re.search(r"it blocks .*(tp \[2, 3\]|rank \[[0-3]\]|world)", cause), f"with its exchange: {cause}"
    assert events(run, "Hung") == [cause], "progress.txt keeps it"
    assert "Traceback" not in errors, f"no stack of errors: {errors}"
    assert "in train_step" in (run / "watch" / "hang.txt").read_text(), "stacks are kept"


@pytest.mark.parametrize("fault", widely(["sleeps", "circles"], "circles"))
def test_a_rank_that_stays_away_by_itself_is_named_with_its_line(tmp_path: Path, data: Path, fault: str) -> None:
    run = tmp_path / "asleep"
    code, _, errors = finish(start(run, data, TP2, HANG, *ENDLESS, fault=(fault, "1", "3")))
    assert code == 1, errors
    (cause,) = events(run, "Hung")
    assert re.search(r"at step 3: rank 1 is at work of its own in dist/survival_program.py:\d+ in strike", cause), cause
    assert "it blocks" in cause, f"rank 0 waits for it: {cause}"


def test_a_long_step_is_no_hang(tmp_path: Path, data: Path) -> None:
    run, limit_s = tmp_path / "long", 2.0
    limit = f"parallel.hang_timeout_minutes={limit_s / 60:.4f}"
    one = ("train.train_iters=1", "train.global_batch_size=480", "train.eval_iters=0")
    code, _, errors = finish(start(run, data, TP2, limit, *one))
    assert code == 0, errors
    assert runs.records(run)[0]["forward_backward_ms"] > 1e3 * limit_s, "else it shows nothing"


def test_a_slow_rank_is_named_and_equal_ranks_are_not(tmp_path: Path, data: Path) -> None:
    steps = ("train.train_iters=30", "log.straggler_interval=10", "train.eval_iters=0", TP2)
    run = tmp_path / "slow"
    code, out, errors = finish(start(run, data, *steps, fault=("slow", "1", "1")))
    assert code == 0, errors
    assert re.search(r"warning: rank 1 is a straggler: [\d.]+ times as slow as its peers", out), out
    assert "rank 0 is a straggler" not in out, "who waits is not slow"

    code, out, errors = finish(start(tmp_path / "equal", data, *steps))
    assert code == 0, errors
    assert "is a straggler" not in out, f"equal ranks: {out}"


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path, data: Path) -> None:
    steps = ("train.train_iters=40", "checkpoint.save_interval=5", TP2)
    run, whole = tmp_path / "killed", tmp_path / "whole"
    job = start(run, data, *steps, "--restarts 2")
    wait_for(lambda: (run / "checkpoints" / "iter_0000005").exists() and steps_of(run) >= 7, "a checkpoint")
    os.kill(rank_process(job, 1), signal.SIGKILL)
    code, out, errors = finish(job)
    assert code == 0, errors
    assert "rank 1 of 2 died: killed by signal 9" in errors, errors
    assert "starting again in 1 s: restart 1 of 2 from the checkpoint of step" in errors, errors
    assert "start 2 of this run" in out and re.search(r"goodput [\d.]+%: .* of 2 starts", out), out
    assert finish(start(whole, data, *steps))[0] == 0
    assert runs.losses(run) == runs.losses(whole), "every step's loss is the same, to the last bit"
    last = [runs.contents(runs.checkpoint_path(one, 40)) for one in (run, whole)]
    assert runs.differences(*last) == [], "and so is the last checkpoint"
    first, second = read_attempts(run)
    assert first.last_step >= 5 and (second.first_step, second.last_step) != (0, 0), "both starts are kept"
    assert ["signal 9" in end.cause for end in read_ends(run)] == [True], "with why the first has ended"


@BREADTH
def test_a_crash_loop_is_recognised_by_its_cause(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "loop"
    options = (TP2, "train.train_iters=20", "checkpoint.save_interval=2", "--restarts 10")
    code, _, errors = finish(start(run, data, *options, fault=("raises", "1", "4")))
    assert code == 1
    assert "not started again: crash loop: 3 starts from the checkpoint of step 2 ended in the same way" in errors
    assert "ValueError: the sensor is broken" in errors.splitlines()[-1], f"with its cause: {errors}"
    waits = [int(seconds) for seconds in re.findall(r"starting again in (\d+) s", errors)]
    assert waits == [1, 4], "the pause grows"
    causes = [json.loads(line)["cause"] for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert len(causes) == 3 and len(set(causes)) == 1, causes


@BREADTH
def test_lost_peers_are_one_sentence_with_the_exchange(tmp_path: Path, data: Path) -> None:
    """Without the watchdog gloo's own time-out ends the ranks."""
    run = tmp_path / "silent"
    limits = ("parallel.hang_timeout_minutes=0", "parallel.distributed_timeout_minutes=0.1")
    job = start(run, data, TP2, *limits, *ENDLESS)
    wait_for(lambda: steps_of(run) >= 3, "training")
    os.kill(rank_process(job, 0), signal.SIGSTOP)
    code, _, errors = finish(job)
    assert code == 1
    said = r"rank 1 at step \d+, in \w+ of (tp|world) \[0, 1\] \(.*\): timed out waiting for 6 s"
    assert re.search(said, errors), errors
    assert "Traceback" not in errors, f"no stack of errors: {errors}"
    assert events(run, "Lost"), "progress.txt keeps it"
