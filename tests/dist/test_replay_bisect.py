"""Two runs that part, down to the operation: a difference that comes back, and one that does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.replay.bisect import bisect
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.step import ReplayedStep, replay_step
from megatron_slm.replay.stream import Phase
from tests import runs
from tests.breadth import BREADTH

ROOT = Path(__file__).resolve().parents[2]
LIGHT = (
    "replay.level=light",
    "parallel.world_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "train.global_batch_size=4",
    "train.train_iters=2",
    "train.eval_iters=0",
    "checkpoint.save_interval=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    assert runs.train(run, data, 2, *LIGHT) == 0
    return run


def flip_in_step_2() -> None:
    """One bit of what an MLP of the first pipeline stage puts out in step 2, the first time."""
    import torch

    from megatron_slm import run
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.train.hook import Hook

    class Flip(Hook):
        def before_forward(self, state: Any, inputs: Any) -> None:
            if state.step + 1 == 2 and torch.distributed.get_rank() == 0:
                mlp = unwrap(state.chunks[0]).decoder.layers[1].mlp
                self.handle = mlp.register_forward_hook(self.strike)

        def strike(self, module: Any, inputs: Any, output: Any) -> Any:
            self.handle.remove()
            struck = output[0].clone()
            struck.detach().view(-1).view(torch.int32)[3] ^= 1 << 22
            return (struck, *output[1:])

    build = run.build_hooks
    run.build_hooks = lambda *given, **named: [*build(*given, **named), Flip()]


def again(capsule: Capsule, step: int) -> ReplayedStep:
    return replay_step(capsule, step, runs.start, capture="op")


def test_a_difference_that_comes_back_is_an_operation_of_a_module(tmp_path: Path, plain: Path, data: Path) -> None:
    changed = tmp_path / "changed"
    assert runs.train(changed, data, 2, *LIGHT, "model.layernorm_epsilon=1e-3") == 0
    found = bisect(Capsule.of(plain), Capsule.of(changed), again)
    assert found.divergence is not None and found.replays == 2
    assert (found.divergence.step, found.divergence.rank) == (1, 0), "the recordings alone name the last stage's loss"
    assert found.divergence.key.phase is Phase.OPERATION and found.divergence.tensor.startswith("aten.")
    assert found.module == "on the way to the output of decoder.layers.0.self_attention", "the norm in front of it"
    assert len(found.made_at) == 2 and found.made_at[0].startswith("parallel/norm.py:"), "one line, with two epsilons"
    assert "rms_norm" in found.made_at[1] and found.made_at[0] in found.render()
    assert found.cause is not None and found.cause.kind == "configuration"
    assert "config.model.layernorm_epsilon" in found.render()
    assert len(found.descent) == 2 and "loss" in found.descent[0] and found.descent[1].endswith(found.module)


def test_a_difference_that_does_not_come_back_is_in_one_recording(tmp_path: Path, plain: Path, data: Path) -> None:
    struck = tmp_path / "struck"
    assert runs.train(struck, data, 2, *LIGHT, plant=flip_in_step_2) == 0
    found = bisect(Capsule.of(plain), Capsule.of(struck), again)
    assert found.divergence is not None and found.cause is not None and found.divergence.step == 2
    assert found.cause.kind == "silent corruption" and str(struck) in found.cause.why
    assert len(found.descent) == 3 and f"{struck / 'replay'} is not repeated" in found.descent[2]


@BREADTH
def test_two_programs_each_make_their_own_run_again(
    tmp_path: Path, plain: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, run = tmp_path / "program", tmp_path / "other"
    for room in ("megatron_slm", "parallel", "kernels", "launch"):
        shutil.copytree(ROOT / room, other / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    norm = other / "parallel" / "norm.py"
    norm.write_text(norm.read_text().replace("self.weight, self.eps)", "self.weight, 2.0 * self.eps)"))
    command = [
        sys.executable,
        "-m",
        "megatron_slm.cli",
        "train",
        *runs.given(run, data, *LIGHT, "train.exit_interval=1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=other, env=environment, capture_output=True, check=False).returncode == 75
    assert cli.main(["replay", "bisect", str(plain), str(run)]) == 2
    refused = capfd.readouterr().err
    assert "was recorded by another program" in refused and "--code DIR DIR" in refused
    assert cli.main(["replay", "bisect", str(plain), str(run), "--code", str(ROOT), str(other)]) == 1
    said = capfd.readouterr().out
    assert said.startswith("1. recordings: step 1") and "  cause     code: " in said
    lines = [line.strip() for line in said.splitlines()]
    assert "return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)" in lines
    assert "return F.rms_norm(x, (self.hidden_size,), self.weight, 2.0 * self.eps)" in lines
    assert cli.main(["replay", "bisect", str(plain), str(run), "--code", str(ROOT), str(data)]) == 2
    assert "is not a checkout" in capfd.readouterr().err


def test_what_was_read_needs_no_replay(
    tmp_path: Path, plain: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert runs.train(other, data, 2, *LIGHT, "data.data_seed=5", "train.train_iters=1") == 0
    capsys.readouterr()
    assert cli.main(["replay", "bisect", str(plain), str(other)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("1. recordings: step 1, rank 0, batch ") and "config.data.data_seed" in said
    assert "\n2. " not in said
    assert cli.main(["replay", "bisect", str(plain), str(plain)]) == 0
    assert "equal" in capsys.readouterr().out
