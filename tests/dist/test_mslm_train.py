"""``mslm train`` as a user types it: the three launchers, stop signals, and input it must refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_slm.launch.local import threads_per_rank
from tests import runs
from tests.breadth import widely

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def arguments(run: Path, data: Path, *overrides: str) -> list[str]:
    """The tokens after ``mslm train``."""
    own = (f"name={run.name}", f"log.runs_dir={run.parent}", f"data.data_path={data}")
    return list({item.split("=")[0]: item for item in (*runs.TINY, *own, *overrides)}.values())


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def mslm(*tokens: str) -> tuple[int, str, str]:
    return finish(start([sys.executable, "-m", "megatron_slm.cli", *tokens]))


def test_every_launcher_trains_the_same_run(tmp_path: Path, data: Path) -> None:
    """Same corpus, seed and layout: the losses agree to the last bit, whoever started the ranks."""
    module = ["-m", "megatron_slm.cli", "train"]
    launchers = {
        "local": [sys.executable, *module],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *module],
        "mpirun": [str(BIN / "mpirun"), "-n", "2", sys.executable, *module],
    }
    bits = {}
    for name, command in launchers.items():
        code, out, errors = finish(start([*command, *arguments(tmp_path / name, data, TP2, "train.train_iters=3")]))
        assert code == 0, f"{name}: {errors}"
        assert "iteration        3/       3" in out
        bits[name] = runs.losses(tmp_path / name)
    assert len(bits["local"]) == 3 and bits["local"] == bits["torchrun"] == bits["mpirun"]


def test_ranks_share_the_cores_where_nobody_says_how_many_threads(tmp_path: Path, data: Path) -> None:
    """torch reads the number when it is imported: the launcher has to set it before."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    own = arguments(tmp_path / "run", data, TP2, "train.train_iters=1")
    command = [sys.executable, "-m", "megatron_slm.cli", "train", *own]
    subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=120)
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert said["threads_per_rank"] == threads_per_rank(2)


@pytest.mark.parametrize("number", widely([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], signal.SIGUSR1))
def test_a_signal_finishes_the_step_saves_and_exits_75(tmp_path: Path, data: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "megatron_slm.cli", "train"]
    process = start([*command, *arguments(run, data, TP2, "train.train_iters=100000")])
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(runs.losses(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    code, _, errors = finish(process)
    assert (code, "Traceback" in errors) == (75, False), errors
    step = max(runs.losses(run))
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == str(step)
    code, out, errors = mslm("train", *arguments(run, data, TP2, f"train.train_iters={step + 1}"))
    assert code == 0 and f"at step {step}" in out, errors
    assert sorted(runs.losses(run)) == list(range(1, step + 2))


def bad(run: Path, data: Path, *overrides: str) -> str:
    """Refused: exit code 2, no traceback, nothing written; returns what was said."""
    code, _, errors = mslm("train", *arguments(run, data, *overrides))
    assert code == 2, errors
    assert "Traceback" not in errors
    assert not run.exists(), f"left behind: {sorted(run.rglob('*'))}"
    return errors


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hiden_size=32", "hidden_size"),
        ("model.hidden_size=wide", "wide"),
        ("parallel.tensor_model_parallel_size=3", "3"),
        ("parallel.pipeline_model_parallel_size=8", "num_layers"),
        ("data.data_path=/nowhere/corpus", "mslm data prepare"),
        ("checkpoint.pretrained_checkpoint=/nowhere/run", "/nowhere/run"),
        ("tokenizer.tokenizer_model=/nowhere/tokenizer.model", "/nowhere/tokenizer.model"),
        ("parallel.device=cuda", "parallel.device=cpu"),
    ],
)
def test_bad_input_is_one_sentence_with_value_and_remedy(tmp_path: Path, data: Path, override: str, said: str) -> None:
    if override == "parallel.device=cuda" and shutil.which("nvidia-smi"):
        pytest.skip("this machine has the GPU that the test wants missing")
    assert said in bad(tmp_path / "run", data, override)


def test_another_tokenizer_is_refused_by_hash(tmp_path: Path, data: Path) -> None:
    from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer

    other = tmp_path / "other.model"
    train_tokenizer(["the quick brown fox jumps over the lazy dog " * 50, "sphinx of black quartz " * 50], 300, other)
    errors = bad(tmp_path / "run", data, f"tokenizer.tokenizer_model={other}")
    ours = Tokenizer.open(data / "tokenizer" / "tokenizer.model").hash
    assert ours[:12] in errors and Tokenizer.open(other).hash[:12] in errors


def test_a_damaged_corpus_is_refused(tmp_path: Path, data: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(data, copy)
    shard = next((copy / "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in bad(tmp_path / "run", copy)


def test_an_unreadable_pretrained_checkpoint_is_refused(tmp_path: Path, data: Path) -> None:
    source = tmp_path / "source"
    assert runs.train(source, data, 1, "train.train_iters=1") == 0
    victim = next(runs.checkpoint_path(source, 1).glob("*.distcp"))
    victim.write_bytes(b"not a checkpoint")
    assert victim.name in bad(tmp_path / "run", data, f"checkpoint.pretrained_checkpoint={source}")


def test_generate_reads_any_layout(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 2, "train.train_iters=2", TP2) == 0
    said = [mslm("generate", str(run), "--prompt", "def ", "--max-new-tokens", "8", "--seed", "3") for _ in range(2)]
    assert said[0] == said[1] and said[0][0] == 0 and said[0][1].startswith("def ")
    code, out, errors = mslm("generate", str(run), "--prompt", "", "--max-new-tokens", "8")
    assert code == 0 and out.strip(), f"nothing after an empty prompt: {errors}"
    code, out, errors = mslm("generate", str(tmp_path / "none"), "--prompt", "x")
    assert code == 2 and out == "" and "holds no checkpoint" in errors


def test_generate_draws_only_what_the_tokenizer_can_say(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=1", "model.vocab_size=50000") == 0
    # The tokenizer has 512 ids: of 20 draws over all 50,000, practically every one would have no text.
    wide = ("--temperature", "100", "--top-k", "100000", "--max-new-tokens", "20")
    code, out, errors = mslm("generate", str(run), "--prompt", "def ", *wide)
    assert code == 0 and out.startswith("def ") and len(out) > 5, errors
