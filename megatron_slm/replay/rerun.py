"""What every replay shares: a recorded run in a directory of its own, what it starts from, and its comparison.

Nothing here starts ranks: who calls hands the function that does. No torch.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_slm.config.load import Resolved
from megatron_slm.errors import CheckpointError, ReplayError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Divergence, first_divergence, frame_difference, pipeline_ranks
from megatron_slm.replay.stream import Flag, Frame, Phase
from megatron_slm.train import publish
from megatron_slm.train.run_directory import IDENTITY

Start = Callable[[Resolved], int]
"""Trains one configuration on ranks of this machine, as ``mslm train`` does; returns the exit code."""
EXIT_REACHED, EXIT_STOPPED = 0, 75
STATE = (Phase.OPTIMIZER, Phase.PARAMETER)
"""What a checkpoint brings back, of that which is recorded at the end of a step."""


def directory_of(resolved: Resolved) -> Path:
    """``runs/NAME``."""
    return Path(resolved.config.log.runs_dir) / str(resolved.config.name)


def recorded(
    resolved: Resolved, directory: Path, *, last: int, save_interval: int | None = None, op_step: int | None = None
) -> Resolved:
    """The same run in ``directory``, recorded at every step and ended after step ``last``.

    Its length stays: the learning rate of a step may depend on it.

    Args:
        op_step: the step whose every operation is recorded; else what the run itself records, ``layer`` at least.
    """
    config = resolved.config
    replay = dataclasses.replace(config.replay, every=1, keep_steps=None, sdc_every=None, on_fault="stop")
    if op_step is not None:
        replay = dataclasses.replace(replay, level="op", op_steps=(str(op_step),))
    elif replay.level != "op":
        replay = dataclasses.replace(replay, level="layer")
    saved = dataclasses.replace(
        config.checkpoint, save_interval=save_interval, keep_last=None, save_retain_interval=None
    )
    return Resolved(
        dataclasses.replace(
            config,
            name=directory.name,
            log=dataclasses.replace(config.log, runs_dir=str(directory.parent)),
            train=dataclasses.replace(config.train, exit_interval=last, exit_duration_in_mins=None),
            checkpoint=saved,
            replay=replay,
        ),
        resolved.provenance,
    )


def anew(place: Path) -> None:
    """Move what an earlier replay has left at ``place`` aside, and make it empty.

    Raises:
        CheckpointError: it cannot be written.
    """
    number = 1
    while (aside := place.with_name(f"{place.name}.{number}")).exists():
        number += 1
    try:
        if place.exists():
            place.rename(aside)
        place.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be written ({error.strerror}); make room there, or name another with log.runs_dir="
        ) from error


def begin_from(source: Path, step: int, directory: Path) -> None:
    """Make ``directory`` the run in ``source`` as it was when step ``step`` was saved; files are shared, not copied.

    Raises:
        CheckpointError: there is no such checkpoint, or ``directory`` cannot be written.
    """
    there = publish.published(source / "checkpoints")
    if step not in there:
        raise CheckpointError(f"{source / 'checkpoints'} holds no checkpoint of step {step}, but of {sorted(there)}.")
    target = publish.checkpoint_path(directory / "checkpoints", step)
    try:
        target.parent.mkdir(parents=True)
        shutil.copy2(source / IDENTITY, directory / IDENTITY)
        shutil.copytree(there[step], target, copy_function=_link)
        (target.parent / publish.TRACKER).write_text(f"{step}\n", encoding="ascii")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error}); make room there.") from error


def run(start: Start, resolved: Resolved, steps: Sequence[int]) -> Capsule:
    """Run it, and give what it has recorded: all of ``steps``, on every rank.

    Raises:
        ReplayError: it has failed, or has ended before.
    """
    directory = directory_of(resolved)
    code = start(resolved)
    if code not in (EXIT_REACHED, EXIT_STOPPED):
        raise ReplayError(f"The run in {directory} has failed with exit code {code}; its message is above.")
    capsule = Capsule.of(directory)
    for rank in capsule.ranks:
        there = {frame.step for frame in capsule.frames(rank) if not frame.flags & (Flag.START | Flag.UNFINISHED)}
        if missing := sorted({*steps} - there):
            raise ReplayError(
                f"The run in {directory} has ended before step {missing[0]} (rank {rank}): it was stopped, or "
                f"train.early_stopping_patience has ended it; {directory / 'log.txt'} says which."
            )
    return capsule


def first_difference(recording: Capsule, replayed: Capsule, start: int) -> Divergence | None:
    """Where a run that was started behind step ``start`` parts from the recording of one that went through it.

    The state it was started with is compared first, with what the recorded run had at the end of that step.
    """
    restored = restored_difference(recording, replayed, start)
    if restored is not None:
        return restored
    found = first_divergence(recording, replayed)
    if found is not None and found.step == start + 1 and found.previous is None:
        return dataclasses.replace(found, previous=start)
    return found


def restored_difference(recording: Capsule, replayed: Capsule, step: int) -> Divergence | None:
    """The first part of parameters and optimizer that was other at the start behind ``step`` than when it was left."""
    stages = pipeline_ranks(recording, replayed)
    for rank in recording.ranks:
        left = _state(recording, rank, step, Flag(0))
        restored = _state(replayed, rank, step, Flag.START)
        if left is None or restored is None:
            continue
        names = recording.names(rank), replayed.names(rank)
        found = frame_difference(left, restored, names)
        if found is not None:
            key, index, only_in = found
            stage, count = stages[rank], max(stages.values()) + 1
            return Divergence(step, True, rank, key, index, stage, count, only_in)
    return None


def _state(capsule: Capsule, rank: int, step: int, start: Flag) -> Frame | None:
    """Parameters and optimizer in a rank's frame of a step, or of a start behind it."""
    for frame in capsule.frames(rank):
        if frame.step == step and frame.flags & Flag.START == start and Flag.UNFINISHED not in frame.flags:
            return frame._replace(records=frame.records[np.isin(frame.records["phase"], STATE)])
    return None


def _link(source: str, target: str) -> str:
    """A second name for the same file, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
