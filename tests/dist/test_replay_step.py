"""Steps made again: from a checkpoint and from the seed, equal to their recording or not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.sdc import TRANSIENT, hunt
from megatron_slm.replay.step import ReplayedStep, replay_step
from megatron_slm.replay.stream import Phase
from tests import replay_plants, runs

ROOT = Path(__file__).resolve().parents[2]
RECORD = (
    "replay.level=light",
    "parallel.world_size=3",
    "train.global_batch_size=6",
    "parallel.use_distributed_optimizer=true",
    "model.attention_dropout=0.1",
    "train.train_iters=5",
    "train.eval_iters=0",
    "checkpoint.save_interval=2",
)
STRUCK = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def flip_in_step_4() -> None:
    """One bit of one gradient of rank 2, in the first micro-batch of step 4."""
    import torch

    from megatron_slm import run
    from megatron_slm.train.hook import Hook
    from megatron_slm.train.optimizer_state import named_parameters

    def strike(gradient: Any) -> Any:
        struck = gradient.clone()
        struck.view(-1).view(torch.int32)[5] ^= 1 << 22
        return struck

    class Flip(Hook):
        def before_forward(self, state: Any, inputs: Any) -> None:
            if state.step + 1 == 4 and torch.distributed.get_rank() == 2:
                self.handle = dict(named_parameters(state.chunks))[STRUCK].register_hook(strike)

        def after_backward(self, state: Any, inputs: Any) -> None:
            if hasattr(self, "handle"):
                self.handle.remove()

    build = run.build_hooks
    run.build_hooks = lambda *given, **named: [*build(*given, **named), Flip()]


def test_a_step_that_was_struck_is_found_by_its_replay(tmp_path: Path, data: Path) -> None:
    struck = tmp_path / "struck"
    assert runs.train(struck, data, 3, *RECORD, plant=flip_in_step_4) == 0
    before = {path: path.stat().st_mtime_ns for path in struck.rglob("*") if path.is_file()}
    recording = Capsule.of(struck)
    made: dict[tuple[int, int], ReplayedStep] = {}

    def replay(step: int, attempt: int, places: int) -> ReplayedStep:
        start = functools.partial(replay_plants.rotated_start, places=places)
        return made.setdefault((step, attempt), replay_step(recording, step, start, attempt=attempt))

    chosen, findings = hunt(recording, 2, replay)
    assert chosen == [2, 4] and list(made) == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert [finding.verdict for finding in findings] == [TRANSIENT]
    assert "step 4, rank 2, local grad" in str(findings[0])
    sound, found = made[2, 1], made[4, 1]
    assert sound.equal and sound.start == 0 and sound.render().startswith("equal: step 2 replayed from step 0")
    assert found.start == 2 and found.divergence is not None and findings[0].divergence is not None
    assert found.divergence.key == findings[0].divergence.key
    assert (found.divergence.step, found.divergence.rank) == (4, 2)
    assert (found.divergence.key.phase, found.divergence.tensor) == (Phase.LOCAL_GRADIENT, STRUCK)
    assert "cause     silent corruption" in found.render() and found.divergence.inputs_equal
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the run itself is left as it is"
    with pytest.raises(ConfigError, match="it has steps 1 to 5"):
        replay_step(recording, 6, runs.start)
    with pytest.raises(ConfigError, match="no step that is a multiple of 7"):
        hunt(recording, 7, replay)


def test_the_command_makes_a_step_again_and_records_its_operations(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "alone"
    alone = ("replay.level=light", "train.train_iters=3", "train.eval_iters=0", "checkpoint.save_interval=1")
    assert runs.train(run, data, 1, *alone) == 0
    command = [sys.executable, "-m", "megatron_slm.cli", "replay", "step", str(run), "3", "--capture", "op"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "equal: step 3 replayed from step 2" in ended.stdout
    assert "threads" not in ended.stdout, "the recorded number of threads was taken"
    again = tmp_path / "alone-replay" / "step-0000003"
    assert cli.main(["replay", "show", str(again), "--step", "3"]) == 0
    assert "aten.mm.default" in capsys.readouterr().out
