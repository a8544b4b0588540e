"""Two runs without recordings: the step in which they part is found from their checkpoints, in either way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.config.load import Resolved
from megatron_slm.errors import ConfigError, ReplayError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.checkpoints_only import (
    HALVING,
    RECORDED,
    Unrecorded,
    bisect_checkpoints,
    interval,
    opened,
    planned,
    step_seconds,
)
from megatron_slm.replay.step import OPERATIONS, ReplayedStep, replay_step
from megatron_slm.replay.stream import Phase
from tests import runs

SILENT = ("train.train_iters=9", "train.eval_iters=0", "checkpoint.save_interval=1", "parallel.world_size=1")
STRUCK = "decoder.layers.1.mlp.linear_fc2.weight"
STEP = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def other_program() -> None:
    """A program that gets one gradient wrong, each time it makes step ``STEP``."""
    from megatron_slm import run
    from megatron_slm.train.hook import Hook
    from megatron_slm.train.optimizer_state import named_parameters

    class Wrong(Hook):
        def before_update(self, state: Any, inputs: Any) -> None:
            if state.step + 1 == STEP:
                dict(named_parameters(state.chunks))[STRUCK].main_grad.view(-1)[5] *= 1.5

    build = run.build_hooks
    run.build_hooks = lambda *given, **named: [Wrong(), *build(*given, **named)]


def start_other(resolved: Resolved) -> int:
    return runs.start(resolved, other_program)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """Runs that are equal up to step 5; of both the checkpoints of steps 1 and 9 are left."""
    import shutil

    folder = tmp_path_factory.mktemp("runs")
    assert runs.train(folder / "first", data, 1, *SILENT) == 0
    assert runs.train(folder / "second", data, 1, *SILENT, plant=other_program) == 0
    for name in ("first", "second"):
        for step in range(2, 9):
            shutil.rmtree(runs.checkpoint_path(folder / name, step))
    return folder / "first", folder / "second"


def both(pair: tuple[Path, Path], *, comes_back: bool = True) -> tuple[Unrecorded, Unrecorded]:
    first, second = pair
    return (
        Unrecorded(first, opened(first), runs.start),
        Unrecorded(second, opened(second), start_other if comes_back else runs.start),
    )


WAYS = {RECORDED: 1, HALVING: 4}
"""Replays of both runs: of 8 steps log2(8), and the one that is left."""


@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_is_found_either_way(way: str, pair: tuple[Path, Path]) -> None:
    assert interval(*pair) == (1, 9)
    found = bisect_checkpoints(*both(pair), way=way)
    assert found.plan is not None and found.plan.way == way and found.replays == WAYS[way]
    assert found.divergence is not None and found.divergence.step == STEP and found.divergence.inputs_equal
    assert (found.divergence.key.phase, found.divergence.tensor) == (Phase.GRADIENT, STRUCK)
    said = found.render()
    assert "equal at step 1, other at step 9" in said and f"steps 2 to 9 of both made again, {way}" in said


def test_a_difference_that_does_not_come_back_is_in_one_run(pair: tuple[Path, Path]) -> None:
    found = bisect_checkpoints(*both(pair, comes_back=False), way=RECORDED)
    assert found.divergence is None and found.unlike == (pair[1],)
    said = found.render()
    assert f"{pair[1]} does not repeat its own checkpoint of step 9" in said
    assert "if another program made one of them" in said and "--code DIR DIR" in said
    environment = pair[1] / "environment.json"
    record = environment.read_text()
    environment.write_text(json.dumps({**json.loads(record), "git": {"commit": "other" * 8, "dirty": False}}))
    found = bisect_checkpoints(*both(pair, comes_back=False), way=RECORDED)
    environment.write_text(record)
    assert f"another program made one of them ({pair[0]} at " in found.render()
    assert f"{pair[1]} at commit otherotherot): give a checkout for each, --code DIR DIR" in found.render()
    named = [replace(one, code=pair[0]) for one in both(pair, comes_back=False)]
    assert "--code" not in bisect_checkpoints(named[0], named[1], way=RECORDED).render()


def test_the_step_that_was_found_is_followed_to_its_operations(pair: tuple[Path, Path]) -> None:
    first, second = both(pair)

    def replay(recording: Capsule, number: int) -> ReplayedStep:
        start = start_other if second.place in recording.folder.parents else runs.start
        return replay_step(recording, number, start, capture=OPERATIONS)

    found = bisect_checkpoints(first, second, way=RECORDED, replay=replay)
    assert found.finer is not None and found.finer.replays == 2
    said = found.render()
    assert f"\n3. recordings: step {STEP}, rank 0, gradient {STRUCK}" in said
    assert f"\n4. step {STEP} of both made again (from steps 1 and 1), every operation: " in said
    assert said.count("first difference: ") == 1


def test_the_cheaper_way_is_taken(pair: tuple[Path, Path]) -> None:
    assert planned(0, 8, 0.1).way == RECORDED, "a few short steps: starting costs more than recording"
    assert planned(0, 1000, 60.0).way == HALVING, "many long steps: recording costs more than starting"
    assert planned(0, 1000, 60.0, way=RECORDED).way == RECORDED and step_seconds(pair[0]) > 0.0


def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of one step in common"):
        (tmp_path / "empty").mkdir()
        interval(pair[0], tmp_path / "empty")
    assert cli.main(["replay", "bisect", str(pair[0]), str(tmp_path / "empty")]) == 2
    assert "is no run of mslm train" in capsys.readouterr().err
    assert cli.main(["replay", "bisect", str(pair[0]), str(pair[0])]) == 0
    assert "equal: every tensor of every checkpoint" in capsys.readouterr().out
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "environment.json"):
        (moved / name).write_text((pair[0] / name).read_text())
    record = json.loads((pair[0] / "data.json").read_text())
    record["sources"]["corpus"]["directory"] = str(tmp_path / "gone")
    (moved / "data.json").write_text(json.dumps(record))
    with pytest.raises(ReplayError, match="corpus corpus: .*gone is gone or damaged"):
        opened(moved)
