"""``mslm replay bisect``: from two recordings down to the operation, with two replays at most. No torch.

The recordings name the first step and, in it, the first tensor that differs, as finely as they were made. That step is
then made again for each of them, every operation recorded. If the replays part, the first operation that differs is
named. If they are equal, the difference has not come back: of the two recordings it is in the one that its own replay
does not repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import Cause, cause
from megatron_slm.replay.diff import Divergence, first_divergence
from megatron_slm.replay.report import divergence_text, phase_name
from megatron_slm.replay.step import ReplayedStep
from megatron_slm.replay.stream import Flag, Frame, Phase

Replay = Callable[[Capsule, int], ReplayedStep]
"""Makes a recorded step again, every operation recorded."""
LOCATED = (Phase.BATCH, Phase.RNG, Phase.OPERATION)
"""Of these a replay could say nothing more: they are read, not computed, or are as fine as can be."""
TRANSIENT = "silent corruption"


@dataclass(frozen=True)
class Bisection:
    """Where two runs part.

    Attributes:
        descent: what was compared and what that has named, coarse to fine.
        replays: steps that were made again.
        divergence: the finest that was found; None where the recordings are equal.
        module: of an operation, between which outputs of modules it was called; of anything else the tensor's own.
    """

    descent: tuple[str, ...]
    replays: int = 0
    divergence: Divergence | None = None
    cause: Cause | None = None
    module: str = ""

    def render(self) -> str:
        """The descent, a line each, and its end."""
        if self.divergence is None or self.cause is None:
            return "equal: every recorded step that both runs have, on every rank"
        lines = [f"{number}. {line}" for number, line in enumerate(self.descent, 1)]
        return "\n".join([*lines, divergence_text(self.divergence, self.cause, self.module)])


def bisect(first: Capsule, second: Capsule, replay: Replay) -> Bisection:
    """Name the first difference of two recorded runs as finely as two replays can.

    Raises:
        ConfigError: the runs have other layouts, or no step in common.
        ReplayError: the step could not be made again.
    """
    found = first_divergence(first, second)
    if found is None:
        return Bisection(())
    recorded = f"recordings: {_where(found)}"
    why = cause(first, second, found)
    if found.start or found.key.phase in LOCATED:
        return Bisection((recorded,), 0, found, why, found.module)
    here, there = replay(first, found.step), replay(second, found.step)
    begin = f"step {found.step} of both made again (from steps {here.start} and {there.start}), every operation"
    finer = first_divergence(here.replayed, there.replayed)
    if finer is not None:
        module = module_of(here.replayed, finer)
        line = f"{begin}: {_where(finer)}" + (f", {module}" if module != finer.module else "")
        return Bisection((recorded, line), 2, finer, cause(here.replayed, there.replayed, finer), module)
    gone = f"{begin}: the replays are equal, so the difference has not come back"
    for capsule, again in ((first, here), (second, there)):
        if again.divergence is not None:
            own = f"each recording against its own replay: {capsule.folder} is not repeated, {_where(again.divergence)}"
            once = Cause(TRANSIENT, f"a result in {capsule.folder} was other than when it was made again", why.evidence)
            return Bisection((recorded, gone, own), 2, again.divergence, once, again.divergence.module)
    both = "each recording against its own replay: equal, as far as all four have recorded the same"
    return Bisection((recorded, gone, both), 2, found, why, found.module)


def module_of(capsule: Capsule, found: Divergence) -> str:
    """The module that an operation belongs to, by what was recorded around it.

    Forward, a module's operations, and those of a norm in front of it, come before its output; backward, they come
    behind the gradient of its output.
    """
    if found.key.phase is not Phase.OPERATION:
        return found.module
    names = capsule.names(found.rank)
    for frame in capsule.frames(found.rank):
        if frame.step == found.step and Flag.START not in frame.flags:
            return _surrounding(frame, names, found.index)
    return found.module


def _surrounding(frame: Frame, names: list[str], index: int) -> str:
    around = [(int(record["phase"]), names[record["name"]].partition(" ")[0]) for record in frame.records]
    for phase, name in around[index:]:
        if phase in (Phase.OUTPUT, Phase.LOSS):
            return f"on the way to the output of {name}"
        if phase in (Phase.OUTPUT_GRADIENT, Phase.LOCAL_GRADIENT):
            break
    before = (name for phase, name in reversed(around[:index]) if phase in (Phase.OUTPUT_GRADIENT, Phase.LOSS))
    return f"behind the gradient of the output of {next(before, 'the model')}"


def _where(found: Divergence) -> str:
    """A difference in a few words."""
    when = f"the start behind step {found.step}" if found.start else f"step {found.step}"
    return f"{when}, rank {found.rank}, {phase_name(found.key.phase)} {found.tensor}"
