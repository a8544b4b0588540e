"""Resume checks: a resumed run makes the same steps; a resume that forgets something is caught and named."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import ConfigError, ReplayError
from megatron_slm.replay.resume import ResumeCheck, resume_check
from megatron_slm.replay.stream import Phase
from tests import runs
from tests.breadth import widely

ROOT = Path(__file__).resolve().parents[2]
AT, STEPS = 2, 1
TP2 = (
    "parallel.world_size=2",
    "parallel.tensor_model_parallel_size=2",
    "parallel.use_distributed_optimizer=true",
    "model.hidden_dropout=0.1",
    "train.train_iters=6",
    "train.eval_iters=0",
)

RECIPE = """\
preset: gpt2
name: big
parallel: {world_size: 4, tensor_model_parallel_size: 4, sequence_parallel: true}
data: {data_path: elsewhere/corpus}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def draw_after_restore() -> None:
    """A resume draws one random number behind the restored state."""
    import torch

    from megatron_slm.train import origin

    resume = origin._resume

    def drawing(*given: object) -> list[str]:
        words = resume(*given)  # type: ignore[arg-type]
        torch.rand(1)
        return words

    origin._resume = drawing


def one_bit_after_restore() -> None:
    """A resume leaves one bit of one moment of the optimizer of rank 1 other than it was saved."""
    import torch

    from megatron_slm.train import origin
    from megatron_slm.train.optimizer_state import inner_optimizers

    resume = origin._resume

    def damaging(state: object, *given: object) -> list[str]:
        words = resume(state, *given)  # type: ignore[arg-type]
        if torch.distributed.get_rank() == 1:
            inner = next(iter(inner_optimizers(state.optimizer)))  # type: ignore[attr-defined]
            moment = next(iter(inner.optimizer.state.values()))["exp_avg"]
            moment.view(-1).view(torch.int32)[0] ^= 1
        return words

    origin._resume = damaging


def stale_averages() -> None:
    """A resume leaves the averages of the weights as the seed has made them."""
    from megatron_slm.train.ema import Ema

    Ema.load = lambda self, loaded: None  # type: ignore[method-assign]


def lost_skips() -> None:
    """A resume forgets which samples it has passed over."""
    import dataclasses

    from megatron_slm.train import origin

    resume = origin._resume

    def forgetting(state: Any, *given: Any) -> list[str]:
        words = resume(state, *given)
        state.cursor = dataclasses.replace(state.cursor, skipped=((0, 1),))
        return words

    origin._resume = forgetting


def checked(folder: Path, data: Path, plant: Callable[[], None] | None = None) -> ResumeCheck:
    """A tiny run's check, with a fault planted in every start of ranks."""
    resolved = load(None, runs.given(folder / "run", data, *TP2))
    return resume_check(resolved, lambda one: runs.start(one, plant), at=AT, steps=STEPS)


def test_a_draw_after_the_restore_is_caught_and_named(tmp_path: Path, data: Path) -> None:
    found = checked(tmp_path, data, draw_after_restore)
    assert found.divergence is not None and not found.equal
    assert (found.divergence.step, found.divergence.key.phase) == (AT + 1, Phase.RNG)
    assert found.divergence.inputs_equal, "parameters and optimizer were restored as they were saved"
    said = found.render()
    assert "NOT EQUAL: steps 3 to 3 on 2 rank(s)" in said and "random numbers: a generator was in another state" in said


def test_a_moment_that_was_not_restored_is_named_at_the_start(tmp_path: Path, data: Path) -> None:
    found = checked(tmp_path, data, one_bit_after_restore).divergence
    assert found is not None
    assert (found.step, found.start, found.rank, found.key.phase) == (AT, True, 1, Phase.OPTIMIZER)
    assert found.key.name.split()[0].endswith(".exp_avg")


LOST = {
    "averages of the weights": (stale_averages, "ema.", "train.ema_decay=0.9"),
    "samples that were passed over": (lost_skips, "state.json, cursor.skipped: [] and [[0, 1]]", "train.seed=1"),
}


@pytest.mark.parametrize("what", widely(LOST, "averages of the weights"))
def test_what_no_fingerprint_shows_is_compared_in_the_checkpoints(what: str, tmp_path: Path, data: Path) -> None:
    plant, named, option = LOST[what]
    alone = ("train.train_iters=6", "train.eval_iters=0", "parallel.world_size=1", option)
    resolved = load(None, runs.given(tmp_path / "run", data, *alone))
    found = resume_check(resolved, lambda one: runs.start(one, plant), at=AT, steps=STEPS)
    assert found.divergence is None and not found.equal
    said = found.render()
    assert "every fingerprint is equal, but what is not recorded was not brought back" in said
    assert any(named in line for line in found.saved) and f"saved at step {AT + STEPS}: " in said


def test_steps_that_a_run_has_not_got_are_refused(tmp_path: Path, data: Path) -> None:
    resolved = load(None, runs.given(tmp_path / "run", data, *TP2))
    with pytest.raises(ConfigError, match=r"train.train_iters = 6"):
        resume_check(resolved, runs.start, at=5, steps=2)
    with pytest.raises(ReplayError, match="exit code 2"):
        resume_check(resolved, lambda one: 2, at=2, steps=2)
    alone = load(None, runs.given(tmp_path / "alone", data, "train.train_iters=6", "train.eval_iters=0"))

    def stopped(one: Resolved) -> int:
        config = dataclasses.replace(one.config, train=dataclasses.replace(one.config.train, exit_interval=1))
        return runs.start(Resolved(config, one.provenance))

    with pytest.raises(ReplayError, match="ended before step 2"):
        resume_check(alone, stopped, at=2, steps=2)


def test_the_command_checks_the_small_runs_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "big.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "megatron_slm.cli", "replay", "resume-check", str(recipe), "--at", "2"]
    given = ["--steps", "1", "--downscale", f"log.runs_dir={tmp_path}", "log.progress_bar=false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *given], capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert "=== 1 of 1: tp2 ===" in ended.stdout and "\nOK: steps 3 to 3 on 2 rank(s)" in ended.stdout
    left = tmp_path / "big-downscaled" / "tp2-resume-check"
    assert {path.name for path in left.iterdir() if path.is_dir()} == {"whole", "resumed"}
