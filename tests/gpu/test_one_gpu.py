"""One GPU: core untouched, the same numbers as a CPU rank, and a bf16 run that learns, stops and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def program(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mslm_train(run: Path, data: Path, *overrides: str) -> int:
    own = (f"name={run.name}", f"log.runs_dir={run.parent}", f"data.data_path={data}")
    given = {item.split("=")[0]: item for item in (*runs.TINY, *own, *overrides)}
    command = [sys.executable, "-m", "megatron_slm.cli", "train", *given.values()]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


def test_nothing_is_substituted() -> None:
    code = (
        "import sys, torch\n"
        "from megatron_slm.parallel import device\n"
        "compile, current = torch.compile, torch.cuda.current_device\n"
        "device.preload('cuda')\n"
        "core = [m for n, m in sys.modules.items() if n.startswith('megatron.core') and hasattr(m, 'torch')]\n"
        "assert all(m.torch is torch for m in core), 'core sees a view'\n"
        "assert (torch.compile, torch.cuda.current_device) == (compile, current)\n"
        "print(len(core))"
    )
    assert int(program(code)) > 20


def test_attention_agrees_with_the_cpu_and_forms_no_score_matrix() -> None:
    from types import SimpleNamespace

    from megatron_slm.parallel.attention import SelfAttentionCore

    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=64)
    module = SelfAttentionCore(config, 1, None, "self")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4096, 1, heads, 64, generator=generator) for heads in (8, 2, 2))
    documents = (torch.arange(4096) // 1500)[None]
    expected = module(q, k, v, documents)
    on_gpu = [x.to("cuda", torch.bfloat16) for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = module(*on_gpu, documents).float().cpu()
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096 * 2 * 8 / 4, "a quarter of one score matrix"


def test_fp32_losses_are_those_of_a_cpu_rank(tmp_path: Path, data: Path) -> None:
    for device in ("cpu", "cuda"):
        assert mslm_train(tmp_path / device, data, f"parallel.device={device}", "train.train_iters=5") == 0
    cpu, cuda = ([r["lm_loss"] for r in runs.records(tmp_path / name)] for name in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-4)


def test_bf16_run_learns_stops_and_resumes(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    cuda = ("parallel.device=cuda", "precision.bf16=true", "optimizer.lr=3e-3", "train.train_iters=40")
    assert mslm_train(run, data, *cuda, "train.exit_interval=20") == 75
    assert mslm_train(run, data, *cuda) == 0
    losses = [record["lm_loss"] for record in runs.records(run)]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(record["memory_bytes"] > 0 for record in runs.records(run))
    moved = (*cuda[1:-1], "parallel.device=cpu", "train.train_iters=41")
    assert mslm_train(run, data, *moved) == 0, "a checkpoint of a GPU is one of a CPU"
