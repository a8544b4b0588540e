"""prepare goes on where it was killed: nothing finished is done again, and the result is the same to the byte."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.preparation.findings import Judge
from megatron_slm.data.preparation.staging import ResumableError, Staging
from megatron_slm.data.preparation.tokenising import Encoder
from megatron_slm.data.preparation.workers import map_in_order
from megatron_slm.data.prepare import prepare
from megatron_slm.data.quality.config import QualityConfig

FUNCTIONS = [block for block in inspect.getsource(argparse).split("\n\n") if block.strip()]
CHUNK_CHARACTERS = 12_000
NUM_CHUNKS = 9
QUALITY = {"exact_duplicates": True, "min_characters": 30}

# Prepares with small chunks, and is killed before the n-th rename: each one keeps a piece of work.
PROGRAM = f"""
import json, os, signal, sys
from megatron_slm.data.preparation import reading
from megatron_slm.data.prepare import prepare
from megatron_slm.data.quality.config import QualityConfig

reading.CHUNK_CHARACTERS = {CHUNK_CHARACTERS}
text, output, workers, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
seen = 0

def count(event, arguments):
    global seen
    if event == "os.rename":
        seen += 1
        if str(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if event == "shutil.rmtree" and kill_at == "after" and os.path.exists(output):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.addaudithook(count)
    quality = QualityConfig(**{QUALITY!r})
    prepare([text], output, vocab_size=500, split=0.1, shard_tokens=5000, quality=quality, workers=workers)
"""

# The command itself, with small chunks.
TERMINATED = f"""
import sys
from megatron_slm.cli import main
from megatron_slm.data.preparation import reading

reading.CHUNK_CHARACTERS = {CHUNK_CHARACTERS}
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", CHUNK_CHARACTERS)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in FUNCTIONS))
    return path


def run(text: Path, output: Path, **options: Any) -> dict[str, Any]:
    given = {"vocab_size": 500, "split": 0.1, "shard_tokens": 5000, "quality": QualityConfig(**QUALITY), "workers": 1}
    return prepare([text], output, **{**given, **options})


def start(text: Path, output: Path, workers: int, kill_at: int | str) -> subprocess.Popen[bytes]:
    program = output.with_name("program.py")
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, str(program), str(text), str(output), str(workers), str(kill_at)], env=environment
    )


def content_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def record(monkeypatch: pytest.MonkeyPatch, work: type) -> list[int]:
    """The numbers of the chunks that ``work`` is done on in this process from now on."""
    numbers: list[int] = []
    original = work.__call__  # type: ignore[operator]

    def call(self: Any, task: Any) -> Any:
        numbers.append((task if work is Judge else task[0]).number)
        return original(self, task)

    monkeypatch.setattr(work, "__call__", call)
    return numbers


# The renames: 1 the request, 2..10 judged chunks, 11 the screening, 12 the tokenizer, 13..21 tokenised chunks, 22 all.
@pytest.mark.parametrize(
    ("kill_at", "judged", "tokenised"),
    [
        (6, range(4, 9), range(9)),
        (12, (), range(9)),
        (13, (), range(9)),
        (18, (), range(5, 9)),
        (22, (), ()),
    ],
    ids=["judging", "before the tokenizer", "before tokenising", "tokenising", "before publishing"],
)
def test_a_killed_command_is_gone_on_with(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, judged: Any, tokenised: Any
) -> None:
    output, staging = tmp_path / "corpus", tmp_path / ".corpus.preparing"
    assert start(text, output, 1, kill_at).wait() == -signal.SIGKILL
    assert not output.exists() and staging.exists()
    judges, encoders = record(monkeypatch, Judge), record(monkeypatch, Encoder)
    result = run(text, output)
    assert (judges, encoders) == (list(judged), list(tokenised))
    assert not staging.exists()
    run(text, tmp_path / "clean")
    assert judges[len(list(judged)) :] == encoders[len(list(tokenised)) :] == list(range(NUM_CHUNKS))
    assert content_of(output) == content_of(tmp_path / "clean")
    assert result["dropped"].keys() == {"exact duplicate", "short"}


def test_a_kill_after_publishing_leaves_a_finished_corpus(text: Path, tmp_path: Path) -> None:
    output, staging = tmp_path / "corpus", tmp_path / ".corpus.preparing"
    assert start(text, output, 1, "after").wait() == -signal.SIGKILL
    assert output.exists() and staging.exists()
    assert run(text, output)["already_prepared"]
    assert not staging.exists()


def test_the_result_depends_neither_on_the_workers_nor_on_a_kill_at_any_moment(text: Path, tmp_path: Path) -> None:
    output, staging = tmp_path / "corpus", tmp_path / ".corpus.preparing"
    child = start(text, output, 2, "never")
    while not (staging / "tokens-000000.npz").exists():
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.001)
    workers = psutil.Process(child.pid).children()
    child.kill()
    child.wait()
    assert workers and psutil.wait_procs(workers, timeout=10)[1] == [], "workers outlive a killed command"
    run(text, output, workers=2)
    run(text, tmp_path / "one", workers=1)
    assert content_of(output) == content_of(tmp_path / "one")


def test_sigterm_ends_the_workers_and_the_finished_chunks_stay(text: Path, tmp_path: Path) -> None:
    text.write_text(text.read_text() * 40)
    staging, program = tmp_path / ".corpus.preparing", tmp_path / "program.py"
    program.write_text(TERMINATED)
    child = subprocess.Popen(
        [sys.executable, str(program), "data", "prepare", str(text), "--output", str(tmp_path / "corpus")]
        + ["--workers", "2", "--scrub-pii"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (staging / "screen-000000.npz").exists():
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.001)
    child.terminate()
    assert child.communicate(timeout=20)[1] == "mslm: terminated\n"
    assert child.returncode == 128 + signal.SIGTERM
    assert (staging / "screen-000000.npz").exists()


def test_a_dead_worker_is_one_sentence_and_the_finished_chunks_stay(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Staging.save

    def save_and_kill(self: Staging, name: str, **arrays: Any) -> None:
        save(self, name, **arrays)
        if name == "tokens-000001":
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    monkeypatch.setattr(Staging, "save", save_and_kill)
    with pytest.raises(ResumableError, match="A worker process died.*same command again") as refused:
        run(text, tmp_path / "corpus", workers=2, quality=None)
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    monkeypatch.setattr("megatron_slm.data.preparation.reading.CHUNK_CHARACTERS", CHUNK_CHARACTERS)
    finished = sorted(path.name for path in (tmp_path / ".corpus.preparing").glob("tokens-*"))
    assert finished[:2] == ["tokens-000000.npz", "tokens-000001.npz"] and len(finished) < NUM_CHUNKS
    encoders = record(monkeypatch, Encoder)
    run(text, tmp_path / "corpus", quality=None)
    assert len(encoders) == NUM_CHUNKS - len(finished)


def test_a_finished_chunk_that_is_damaged_is_made_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(text, tmp_path / "corpus", 1, 22).wait() == -signal.SIGKILL
    chunk = tmp_path / ".corpus.preparing" / "tokens-000003.npz"
    chunk.write_bytes(chunk.read_bytes()[:-30])
    with pytest.raises(ResumableError, match=r"tokens-000003\.npz is damaged\. Run the same command again"):
        run(text, tmp_path / "corpus")
    encoders = record(monkeypatch, Encoder)
    run(text, tmp_path / "corpus")
    assert encoders == [3]
    run(text, tmp_path / "clean")
    assert content_of(tmp_path / "corpus") == content_of(tmp_path / "clean")


def test_the_work_of_another_request_is_removed_and_that_is_said(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(text, tmp_path / "corpus", 1, 18).wait() == -signal.SIGKILL
    encoders = record(monkeypatch, Encoder)
    run(text, tmp_path / "corpus", vocab_size=510)
    assert "held the unfinished work of another request; it is removed" in capsys.readouterr().err
    assert encoders == list(range(NUM_CHUNKS))
    assert read_manifest(tmp_path / "corpus")["tokenizer"]["vocab_size"] == 510


def test_results_come_in_order_and_a_single_task_needs_no_process() -> None:
    assert list(map_in_order(abs, range(-20, 0), 2)) == list(range(20, 0, -1))
    assert list(map_in_order(lambda task: os.getpid(), [1], 8)) == [os.getpid()]
    assert list(map_in_order(abs, [], 8)) == []


def _long_answer(task: int) -> bytes:
    """Longer than any pipe's buffer: a worker is killed while it writes."""
    return bytes(64 << 20)


def test_a_worker_that_dies_in_the_middle_of_an_answer_is_noticed() -> None:
    before = {child.pid for child in psutil.Process().children()}

    def kill_the_workers() -> None:
        while True:
            own = [child for child in psutil.Process().children() if child.pid not in before]
            workers = [child for child in own if "spawn_main" in " ".join(child.cmdline())]
            if len(workers) == 2:
                time.sleep(0.05)
                for worker in workers:
                    worker.kill()
                return
            time.sleep(0.01)

    answers = map_in_order(_long_answer, range(1000), 2)
    next(answers)
    killer = threading.Thread(target=kill_the_workers)
    killer.start()
    with pytest.raises(ResumableError, match="A worker process died"):
        for _ in answers:
            pass
    killer.join()
