"""``mslm replay step``: a recorded step once more, from the nearest checkpoint before it. No torch.

The run's own checkpoints are read and never written: the replay has a directory of its own beside the run,
``NAME-replay``, which is started anew each time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import FOLDER, Capsule
from megatron_slm.replay.cause import Circumstance, cause, circumstances, corpora_first
from megatron_slm.replay.diff import Divergence, steps_text
from megatron_slm.replay.kept import with_inputs
from megatron_slm.replay.report import SHOWN, divergence_text
from megatron_slm.replay.rerun import Start, anew, begin_from, first_difference, recorded, run
from megatron_slm.replay.search import places, read_at, whole_steps
from megatron_slm.replay.stream import Flag, names_path, require_names, stream_path
from megatron_slm.train import publish
from megatron_slm.train.run_directory import RunDirectory, locked

OPERATIONS = "op"


@dataclass(frozen=True)
class ReplayedStep:
    """A recording, what its replay has recorded, and where they part.

    Attributes:
        start: completed steps of the checkpoint that the replay began with; 0 where it began anew.
    """

    recording: Capsule
    replayed: Capsule
    step: int
    start: int
    divergence: Divergence | None
    inputs: str = "from the corpora"

    @property
    def equal(self) -> bool:
        """Whether everything that both have recorded is equal to the last bit."""
        return self.divergence is None

    @property
    def circumstances(self) -> list[Circumstance]:
        """What was not the same in the replay, and may matter."""
        found = circumstances(self.recording, self.replayed, self.step)
        return corpora_first(found, self.recording, self.replayed, self.step)

    def render(self) -> str:
        """The verdict in words."""
        made = f"step {self.step} replayed from step {self.start} {self.inputs} in {self.replayed.folder.parent}"
        if self.divergence is not None:
            why = cause(self.recording, self.replayed, self.divergence)
            return f"NOT EQUAL: {made}\n{divergence_text(self.divergence, why)}"
        lines = [f"equal: {made}, on {len(self.recording.ranks)} rank(s)"]
        lines += [f"  although other: {fact}" for fact in self.circumstances[:SHOWN]]
        return "\n".join(lines)


def replay_step(
    recording: Capsule, step: int, start: Start, *, capture: str | None = None, attempt: int = 1, kept: bool = False
) -> ReplayedStep:
    """Make a recorded step again, and compare every step from the checkpoint to it with the recording.

    Args:
        start: trains one configuration on as many ranks as it says.
        capture: ``op`` to record every operation of that step.
        attempt: 2 for a second replay beside the first.
        kept: read the kept batches even where the corpora are there.

    Raises:
        ConfigError: the step was not recorded.
        ReplayError: the run could not be made again; names what is missing.
    """
    require_recorded(recording, step)
    own = run_directory(recording)
    place = own.with_name(f"{own.name}-replay")
    directory = place / (f"step-{step:07d}" if attempt == 1 else f"step-{step:07d}-{attempt}")
    before = begins_from(recording, step)
    steps = range(before + 1, step + 1)
    with locked(RunDirectory(place)):
        place.mkdir(parents=True, exist_ok=True)
        anew(directory)
        resolved, inputs = with_inputs(
            configuration(recording, step, directory.with_suffix(".json")), recording, steps, kept=kept
        )
        if before:
            begin_from(own, before, directory)
        else:
            directory.rmdir()  # a run makes its own
        op_step = step if capture == OPERATIONS else None
        again = recorded(resolved, directory, last=step, op_step=op_step)
        replayed = run(start, again, steps)
    return ReplayedStep(recording, replayed, step, before, first_difference(recording, replayed, before), inputs)


def begins_from(recording: Capsule, step: int) -> int:
    """Completed steps of the newest checkpoint before ``step``; 0 where there is none."""
    return max((done for done in publish.published(run_directory(recording) / "checkpoints") if done < step), default=0)


def run_directory(recording: Capsule) -> Path:
    """The directory of the run that was recorded.

    Raises:
        ConfigError: the recording lies in none, so that there are no checkpoints beside it.
    """
    if recording.folder.name != FOLDER:
        raise ConfigError(
            f"{recording.folder} is a recording outside of its run. Put it back to NAME/{FOLDER}, beside the run's "
            "checkpoints."
        )
    return recording.folder.parent


def configuration(recording: Capsule, step: int, file: Path) -> Resolved:
    """The configuration under which a step was made, with as many ranks; written to ``file`` on the way."""
    manifest = recording.manifest(step)
    file.write_text(json.dumps(manifest["config"], indent=1) + "\n", encoding="utf-8")
    resolved = load(file)
    parallel = resolved.config.parallel
    if (parallel.world_size or parallel.smallest_world_size) == manifest["world_size"]:
        return resolved
    parallel = dataclasses.replace(parallel, world_size=manifest["world_size"])
    return Resolved(dataclasses.replace(resolved.config, parallel=parallel), resolved.provenance)


def threads(recording: Capsule, step: int) -> int:
    """Threads that every rank had; the first rank's."""
    count: int = recording.manifest(step, recording.ranks[0])["threads"]["intra_op"]
    return count


def require_recorded(recording: Capsule, step: int) -> None:
    """Refuse a step that there is nothing to compare with.

    Raises:
        ConfigError: names the recorded steps.
        CheckpointError: a rank's stream is missing or damaged.
    """
    recording.require_streams()
    for rank in recording.ranks:
        path = stream_path(recording.folder, rank)
        found = places(path)
        steps = whole_steps(found)
        if step not in steps:
            raise ConfigError(f"Step {step} is not in {recording.folder}: of rank {rank} it has {steps_text(steps)}.")
        own = next(place for place in found if place.key == (step, False))
        require_names(names_path(recording.folder, rank), read_at(path, own), recording.names(rank))


def recorded_steps(recording: Capsule) -> Sequence[int]:
    """Whole steps of the first rank."""
    frames = recording.frames(recording.ranks[0])
    return sorted({frame.step for frame in frames if not frame.flags & (Flag.START | Flag.UNFINISHED)})
