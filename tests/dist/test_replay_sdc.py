"""Single bits flipped in one rank's gradient before its reduction: transient or persistent, and rank and slot named."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.sdc import PERSISTENT, TRANSIENT, Finding, hunt
from megatron_slm.replay.step import ReplayedStep, replay_step
from megatron_slm.replay.stream import Phase
from tests import replay_plants, runs
from tests.ranks import RankFailure, run_ranks

DP3 = (
    "replay.level=light",
    "parallel.world_size=3",
    "parallel.use_distributed_optimizer=true",
    "train.global_batch_size=6",
    "train.train_iters=2",
    "train.eval_iters=0",
    "model.num_layers=2",
    "model.attention_dropout=0.1",
    "checkpoint.save_interval=1",
)
Plant = Callable[[], None]
FLIP = partial(replay_plants.gradient_bit, 2, 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def hunted(run: Path, plant: Callable[[int], Plant | None], made: dict[int, ReplayedStep]) -> list[Finding]:
    """Step 2 made again and again, with the plant of each attempt; ``made`` takes the replays, or has them already."""
    recording = Capsule.of(run)

    def replay(step: int, attempt: int, places: int) -> ReplayedStep:
        if attempt not in made:
            start = partial(replay_plants.rotated_start, places=places, plant=plant(attempt))
            made[attempt] = replay_step(recording, step, start, attempt=attempt)
        return made[attempt]

    return hunt(recording, 2, replay)[1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sound"
    assert runs.train(run, data, 3, *DP3) == 0
    return run


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Every step is checked, and the second struck."""
    run = tmp_path_factory.mktemp("runs") / "struck"
    assert runs.train(run, data, 3, *DP3, "replay.sdc_every=1", "replay.on_fault=continue", plant=FLIP) == 0
    return run


def test_transient_faults_are_told_from_sound_steps(sound: Path, struck: Path) -> None:
    made: dict[int, ReplayedStep] = {}
    assert hunted(sound, lambda attempt: None, made) == [], "moved ranks compute the same bits"
    assert list(made) == [1, 2]
    # The struck run began its second step like the sound one, whose replays are therefore also its own.
    (recorded,) = hunted(struck, lambda attempt: None, dict(made))
    assert recorded.verdict == TRANSIENT and "transient, in the recorded run: rank 2 on slot 2 of" in str(recorded)
    assert (recorded.divergence.step, recorded.divergence.key.phase) == (2, Phase.LOCAL_GRADIENT)
    assert recorded.divergence.tensor == replay_plants.STRUCK
    (replayed,) = hunted(sound, lambda attempt: FLIP if attempt == 2 else None, {1: made[1]})
    assert replayed.verdict == TRANSIENT
    assert "transient, in replay 2 with ranks moved by 1: rank 2 on slot 0 of" in str(replayed)


def test_a_persistent_fault_is_its_slots(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "faulty"
    fault = partial(replay_plants.slot_gradient_bit, 1)
    assert runs.train(run, data, 3, *DP3, plant=fault) == 0
    (found,) = hunted(run, lambda attempt: fault, {})
    assert found.verdict == PERSISTENT and [one.slot.number for one in found.found] == [1]
    assert "rank 1 in the recorded run, rank 1 in replay 1, rank 0 in replay 2 with ranks moved by 1" in str(found)


def test_a_fault_is_caught_before_its_update(tmp_path: Path, data: Path, sound: Path, struck: Path) -> None:
    assert runs.losses(sound) == runs.losses(struck)
    states = [runs.contents(runs.checkpoint_path(run, 2)) for run in (sound, struck)]
    assert runs.differences(*states) == [], "checked steps change nothing, and what two of three passes gave is right"
    (warning,) = (line for line in (struck / "log.txt").read_text().splitlines() if "made again" in line)
    assert "step 2: " in warning and "the first of three passes differs from the other two" in warning
    assert "a transient fault at rank 2 on slot 2 of" in warning
    assert f"local gradient, {replay_plants.STRUCK}. Gone on" in warning
    stopped = tmp_path / "stopped"
    with pytest.raises(RankFailure) as failed:
        runs.train(stopped, data, 3, *DP3, "replay.sdc_every=2", plant=FLIP)
    assert failed.value.code == 17 and "mslm: step 2: " in str(failed.value)
    assert sorted(runs.losses(stopped)) == [1], "nothing of the step was applied"


def place() -> tuple[int, int, int]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_rank())
    assert everyone == list(range(len(everyone)))
    return dist.get_rank(), int(os.environ["MSLM_SLOT"]), int(os.environ["LOCAL_RANK"])


def test_the_launcher_moves_the_ranks_it_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSLM_ROTATE_RANKS", "1")
    assert run_ranks(place, 3) == [(0, 1, 1), (1, 2, 2), (2, 0, 0)], "(rank, slot, device) by rank"
