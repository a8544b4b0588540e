"""``mslm replay bisect`` of runs without recordings: the step in which they part, from their checkpoints. No torch.

The tensors of the checkpoints that both runs have say between which two of them the runs part. The steps between are
made again for both runs, from the checkpoint that is equal (or from the seed), in the cheaper of two ways:

    recorded   once through all n steps with their fingerprints, which name the step and the tensor
    halving    ceil(log2(n)) short replays that compare what they have saved, and the step that is left once recorded

What these recordings say of the step is then followed down to the operation, as ``bisect.py`` does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import CheckpointError, ConfigError, ReplayError
from megatron_slm.replay.bisect import Bisection, Replay, bisect
from megatron_slm.replay.capsule import FOLDER, Capsule, require_directory
from megatron_slm.replay.cause import Cause, cause
from megatron_slm.replay.diff import Divergence, first_divergence
from megatron_slm.replay.kept import from_corpora
from megatron_slm.replay.report import divergence_text
from megatron_slm.replay.rerun import EXIT_REACHED, EXIT_STOPPED, Start, anew, begin_from, recorded, run
from megatron_slm.replay.stream import ranks_in
from megatron_slm.train import global_hash, publish
from megatron_slm.train.run_directory import RunDirectory, locked

RECORDED, HALVING = "recorded", "halving"
START_SECONDS = 15.0
"""Assumed for starting one run and saving it: what a replay costs beside its steps."""
RECORDING = 1.05
"""Assumed for a step that is recorded, against one that is not."""


class Plan(NamedTuple):
    """How the steps behind ``equal`` up to ``other`` are searched, and what each way was expected to take."""

    equal: int
    other: int
    way: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        costs = ", ".join(f"{way} {seconds:.0f} s" for way, seconds in self.seconds.items())
        return f"steps {self.equal + 1} to {self.other} of both made again, {self.way} (expected: {costs})"


@dataclass(frozen=True)
class Unrecorded:
    """A run of which there are checkpoints: its directory, its configuration, and what starts it.

    Attributes:
        code: the checkout that was named for it; None where the program that is running makes its steps again.
    """

    path: Path
    resolved: Resolved
    start: Start
    code: Path | None = None

    @property
    def place(self) -> Path:
        """Where its replays lie."""
        return self.path.with_name(f"{self.path.name}-replay")


@dataclass(frozen=True)
class Parting:
    """Where two runs part.

    Attributes:
        plan: None where their checkpoints are equal.
        replays: how many times both runs were started.
        divergence: None where the replays are equal, so that the difference has not come back.
        unlike: runs whose replay does not repeat their own checkpoint.
        programs: of replays that are equal, how another program may have made the runs.
        finer: the step of ``divergence`` down to the operation, where that was asked for.
    """

    plan: Plan | None
    replays: int = 0
    divergence: Divergence | None = None
    cause: Cause | None = None
    unlike: tuple[Path, ...] = ()
    programs: str | None = None
    finer: Bisection | None = None

    def render(self) -> str:
        """In words."""
        if self.plan is None:
            return "equal: every tensor of every checkpoint that both runs have"
        lines = [
            f"1. checkpoints: equal at step {self.plan.equal}{'' if self.plan.equal else ', the start'}, other at step "
            f"{self.plan.other}",
            f"2. {self.plan}; {self.replays} replay(s) of both",
        ]
        if self.finer is not None and self.finer.divergence is not None:
            return "\n".join([*lines, self.finer.render(3)])
        if self.divergence is not None and self.cause is not None:
            return "\n".join([*lines, divergence_text(self.divergence, self.cause)])
        lines.append("3. the replays are equal, so the difference has not come back")
        lines += [f"   {path} does not repeat its own checkpoint of step {self.plan.other}" for path in self.unlike]
        lines += [f"   {self.programs}"] if self.programs is not None else []
        return "\n".join(lines)


def without_recording(paths: list[Path]) -> bool:
    """Whether any of the runs has none.

    Raises:
        CheckpointError: there is no such directory.
    """
    for path in paths:
        require_directory(path)
    return not all(ranks_in(path / FOLDER) or ranks_in(path) for path in paths)


def opened(path: Path) -> Resolved:
    """The configuration of a run, with the ranks that it had and its corpora where they were.

    Raises:
        ConfigError: it is no run.
        ReplayError: a corpus is gone.
    """
    world_size, sources = _fact(path, "environment.json", "world_size"), _fact(path, "data.json", "sources")
    resolved = from_corpora(load(path / "config.yaml"), sources)
    parallel = dataclasses.replace(resolved.config.parallel, world_size=world_size)
    return Resolved(dataclasses.replace(resolved.config, parallel=parallel), resolved.provenance)


def threads(path: Path) -> int:
    """Threads that every rank of a run had.

    Raises:
        ConfigError: it is no run.
    """
    return int(_fact(path, "environment.json", "threads_per_rank"))


def bisect_checkpoints(
    first: Unrecorded, second: Unrecorded, *, way: str | None = None, replay: Replay | None = None
) -> Parting:
    """Find the first step after which two runs are not the same, and the first tensor of it.

    Args:
        way: ``RECORDED`` or ``HALVING`` instead of the cheaper one.
        replay: makes a step of what was recorded on the way again, down to its operations; default nobody does.

    Raises:
        ConfigError: the runs have no checkpoint in common.
        CheckpointError: one is damaged, or nothing can be written beside the runs.
        ReplayError: a run could not be made again.
    """
    found = interval(first.path, second.path)
    if found is None:
        return Parting(None)
    equal, other = found
    plan = planned(equal, other, step_seconds(first.path) + step_seconds(second.path), way=way)
    runs = (first, second)
    with contextlib.ExitStack() as held:
        for one in runs:
            held.enter_context(locked(RunDirectory(one.place)))
            one.place.mkdir(parents=True, exist_ok=True)
        origins = {one.path: one.path for one in runs}
        halvings = 0
        if plan.way == HALVING:
            equal, last, halvings = _halve(runs, origins, equal, other)
        else:
            last = other
        here, there = (_recorded(one, origins[one.path], equal, last) for one in runs)
        divergence = first_divergence(here, there)
        if divergence is None:
            unlike = tuple(
                one.path
                for one, again in zip(runs, (here, there), strict=True)
                if last == other and not same_state(one.path, again.folder.parent, other)
            )
            return Parting(plan, halvings + 1, None, None, unlike, _programs(first, second))
        if divergence.step == equal + 1 and divergence.previous is None and not divergence.start:
            divergence = dataclasses.replace(divergence, previous=equal)
        finer = None if replay is None else bisect(here, there, replay)
        return Parting(plan, halvings + 1, divergence, cause(here, there, divergence), finer=finer)


def interval(first: Path, second: Path) -> tuple[int, int] | None:
    """(last common checkpoint that is equal, 0 for the start; first that is not); None where all are equal.

    Raises:
        ConfigError: there is no common one.
        CheckpointError: one is damaged.
    """
    common = sorted({*_checkpoints(first)} & {*_checkpoints(second)})
    if not common:
        raise ConfigError(
            f"{first} and {second} have no recording and no checkpoint of one step in common. Record them with "
            "mslm train --record layer, or save with checkpoint.save_interval."
        )
    equal = 0
    for step in common:
        if not same_state(first, second, step):
            return equal, step
        equal = step
    return None


def same_state(first: Path, second: Path, step: int) -> bool:
    """Whether every tensor of two runs' checkpoints of a step is equal to the last bit."""
    hashes = [global_hash.tensor_hashes(_checkpoints(path)[step]) for path in (first, second)]
    return hashes[0] == hashes[1]


def planned(equal: int, other: int, seconds: float, *, way: str | None = None) -> Plan:
    """The cheaper way.

    Args:
        seconds: of a step of both runs together.
    """
    steps = other - equal
    costs = {
        RECORDED: 2 * START_SECONDS + RECORDING * steps * seconds,
        HALVING: 2 * START_SECONDS * (math.ceil(math.log2(steps)) + 1) + (steps - 1 + RECORDING) * seconds,
    }
    return Plan(equal, other, way or min(costs, key=lambda name: costs[name]), costs)


def step_seconds(path: Path) -> float:
    """Median time of a step, by the run's own log; 1 where it has none."""
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return statistics.median(json.loads(line)["step_ms"] for line in lines) / 1000.0
    except (OSError, ValueError, KeyError):
        return 1.0


def _programs(first: Unrecorded, second: Unrecorded) -> str | None:
    """Whether other programs may have made the runs than their replays; None where they were named."""
    if first.code is not None and second.code is not None:
        return None
    commits = [(_fact(one.path, "environment.json", "git") or {}).get("commit") for one in (first, second)]
    way_out = "give a checkout for each, --code DIR DIR"
    if commits[0] != commits[1]:
        made = " and ".join(
            f"{one.path} at {'no commit' if commit is None else f'commit {commit[:12]}'}"
            for one, commit in zip((first, second), commits, strict=True)
        )
        return f"both were made again by this program, but another program made one of them ({made}): {way_out}"
    return (
        "both were made again by this program: if another program made one of them, which a run without a recording "
        f"does not say, {way_out}"
    )


def _fact(path: Path, file: str, name: str) -> Any:
    try:
        return json.loads((path / file).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no run of mslm train ({file}: {error!r}); name a run's directory.") from error


def _halve(
    runs: tuple[Unrecorded, Unrecorded], origins: dict[Path, Path], equal: int, other: int
) -> tuple[int, int, int]:
    """(step that is equal, the step behind it, replays); ``origins`` is left at where the former is saved."""
    replays = 0
    while other - equal > 1:
        middle = (equal + other) // 2
        here, there = (_plain(one, origins[one.path], equal, middle) for one in runs)
        replays += 1
        if same_state(here, there, middle):
            equal = middle
            origins.update({runs[0].path: here, runs[1].path: there})
        else:
            other = middle
    return equal, other, replays


def _plain(one: Unrecorded, origin: Path, before: int, last: int) -> Path:
    """Make a run's steps up to ``last`` again, record nothing, and save."""
    directory = _begun(one, origin, before, f"to-{last:07d}")
    resolved = recorded(one.resolved, directory, last=last)
    silent = dataclasses.replace(resolved.config.replay, level="none", op_steps=())
    code = one.start(Resolved(dataclasses.replace(resolved.config, replay=silent), resolved.provenance))
    if code not in (EXIT_REACHED, EXIT_STOPPED) or last not in _checkpoints(directory):
        raise ReplayError(f"The run in {directory} has not come to step {last} (exit code {code}); see its log.txt.")
    return directory


def _recorded(one: Unrecorded, origin: Path, before: int, last: int) -> Capsule:
    """Make a run's steps up to ``last`` again, and record them."""
    directory = _begun(one, origin, before, f"recorded-{last:07d}")
    return run(one.start, recorded(one.resolved, directory, last=last), range(before + 1, last + 1))


def _begun(one: Unrecorded, origin: Path, before: int, name: str) -> Path:
    """A directory in which a run goes on behind step ``before`` of ``origin``; 0 for from its seed."""
    directory = one.place / name
    anew(directory)
    if before:
        begin_from(origin, before, directory)
    else:
        directory.rmdir()  # a run makes its own
    return directory


def _checkpoints(path: Path) -> dict[int, Path]:
    found = publish.published(path / "checkpoints")
    if not found and not path.is_dir():
        raise CheckpointError(f"{path} is not there; name a run's directory.")
    return found
