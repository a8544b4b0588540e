"""``mslm replay resume-check``: a run that was resumed against the same run that never stopped. No torch.

One run goes through step K to step K + M. A second one begins with the first one's checkpoint of step K and makes the
M steps again. Whatever a checkpoint does not bring back (a random state, a moment of the optimizer, the place in the
data) is then a record that differs, and the first one names it. What is not recorded but saved (averages of the
weights, the data cursor, what guard and hooks remember) is compared in the checkpoints that both leave at the end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config.load import Resolved
from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import cause
from megatron_slm.replay.diff import Divergence
from megatron_slm.replay.report import SHOWN, divergence_text
from megatron_slm.replay.rerun import Start, anew, begin_from, directory_of, first_difference, recorded, run
from megatron_slm.train import global_hash, publish
from megatron_slm.train.run_directory import RunDirectory, locked
from megatron_slm.train.saved_state import read_state

WHOLE, RESUMED = "whole", "resumed"


@dataclass(frozen=True)
class ResumeCheck:
    """Two recordings of the steps behind ``at``, where they part, and what they have not saved alike in the end."""

    whole: Capsule
    resumed: Capsule
    at: int
    last: int
    divergence: Divergence | None
    saved: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every recorded tensor of every step and rank, and all that is saved, is equal to the last bit."""
        return self.divergence is None and not self.saved

    def render(self) -> str:
        """The verdict in words."""
        steps = f"steps {self.at + 1} to {self.last} on {len(self.whole.ranks)} rank(s)"
        if self.equal:
            count = sum(
                len(frame.records)
                for rank in self.resumed.ranks
                for frame in self.resumed.frames(rank)
                if frame.step > self.at
            )
            return (
                f"OK: {steps} are the same with and without a resume at step {self.at}, all of {count} fingerprints "
                f"and all of the checkpoint of step {self.last}"
            )
        lines = [f"NOT EQUAL: {steps} with and without a resume at step {self.at}"]
        if self.divergence is not None:
            lines.append(divergence_text(self.divergence, cause(self.whole, self.resumed, self.divergence)))
        else:
            lines.append("every fingerprint is equal, but what is not recorded was not brought back:")
        lines += [f"  saved at step {self.last}: {line}" for line in self.saved[:SHOWN]]
        lines += [f"  and {len(self.saved) - SHOWN} more"] if len(self.saved) > SHOWN else []
        return "\n".join(lines)


def resume_check(resolved: Resolved, start: Start, *, at: int, steps: int) -> ResumeCheck:
    """Run to ``at`` + ``steps``, resume at ``at`` in a second run, and compare.

    The runs lie in ``runs/NAME-resume-check``, and are started anew; what lies there is moved aside.

    Args:
        start: trains one configuration on as many ranks as it says.
        at: completed steps of the checkpoint that is resumed.
        steps: steps behind it that are compared.

    Raises:
        ConfigError: the run has not got so many steps.
        ReplayError: one of the two runs has failed.
    """
    last = at + steps
    require_steps(resolved, at, steps)
    own = directory_of(resolved)
    place = own.with_name(f"{own.name}-resume-check")
    with locked(RunDirectory(place)):
        anew(place)
        whole = run(start, recorded(resolved, place / WHOLE, last=last, save_interval=at), range(1, last + 1))
        begin_from(place / WHOLE, at, place / RESUMED)
        again = recorded(resolved, place / RESUMED, last=last, save_interval=at)
        resumed = run(start, again, range(at + 1, last + 1))
        saved = saved_differences(*(_checkpoint(place / name, last) for name in (WHOLE, RESUMED)))
    return ResumeCheck(whole, resumed, at, last, first_difference(whole, resumed, at), tuple(saved))


def saved_differences(first: Path, second: Path) -> list[str]:
    """A line for everything that two checkpoints of one step do not hold alike: of ``state.json``, then the tensors.

    Raises:
        CheckpointError: one is damaged.
    """
    here, there = (_flat(asdict(read_state(path))) for path in (first, second))
    facts = [
        f"state.json, {key}: {here.get(key)} and {there.get(key)}"
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
    return facts + global_hash.differing(*(global_hash.tensor_hashes(path) for path in (first, second)))


def require_steps(resolved: Resolved, at: int, steps: int) -> None:
    """Refuse steps that the run has not got.

    Raises:
        ConfigError: says how many there are.
    """
    length = resolved.config.train.train_iters
    if at < 1 or steps < 1 or at + steps > length:
        raise ConfigError(
            f"--at {at} --steps {steps}: both must be at least 1 and together at most train.train_iters = {length} "
            f"of {resolved.config.name}."
        )


def _checkpoint(run: Path, step: int) -> Path:
    """Of a run that has ended behind ``step``, and so has saved it."""
    return publish.published(run / "checkpoints")[step]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names; lists are values."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: one for key, inner in value.items() for name, one in _flat(inner, f"{prefix}{key}.").items()}
