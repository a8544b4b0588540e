"""``mslm replay bisect``: from two recordings down to the operation, with two replays at most. No torch.

The recordings name the first step and, in it, the first tensor that differs, as finely as they were made. That step is
then made again for each of them, every operation recorded. If the replays part, the first operation that differs is
named, and the line of source that called it. If they are equal, the difference has not come back: of the two recordings
it is in the one that its own replay does not repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.errors import ConfigError
from megatron_slm.replay import places, source
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import Cause, cause
from megatron_slm.replay.diff import Divergence, compare, first_divergence
from megatron_slm.replay.places import Place
from megatron_slm.replay.report import divergence_text, phase_name
from megatron_slm.replay.step import ReplayedStep
from megatron_slm.replay.stream import Flag, Frame, Phase

Replay = Callable[[Capsule, int], ReplayedStep]
"""Makes a recorded step again, every operation recorded."""
Call = tuple[str, int]
"""Name of an operation's record, and how many of that name came before it in the step."""
LOCATED = (Phase.BATCH, Phase.RNG, Phase.OPERATION)
"""Of these a replay could say nothing more: they are read, not computed, or are as fine as can be."""
TRANSIENT = "silent corruption"


@dataclass(frozen=True)
class Bisection:
    """Where two runs part.

    Attributes:
        descent: what was compared and what that has named, coarse to fine; of equal ones the steps of one run alone.
        replays: steps that were made again.
        divergence: the finest that was found; None where the recordings are equal.
        module: of an operation, between which outputs of modules it was called; of anything else the tensor's own.
        made_at: of an operation, the line of source that called it, in each of the runs where they have two.
    """

    descent: tuple[str, ...]
    replays: int = 0
    divergence: Divergence | None = None
    cause: Cause | None = None
    module: str = ""
    made_at: tuple[str, ...] = ()

    def render(self, begin: int = 1) -> str:
        """The descent, a line each, counted from ``begin`` on, and its end."""
        if self.divergence is None or self.cause is None:
            return "\n".join(
                ["equal: every recorded step that both runs have, on every rank", *(f"  {one}" for one in self.descent)]
            )
        lines = [f"{number}. {line}" for number, line in enumerate(self.descent, begin)]
        return "\n".join([*lines, divergence_text(self.divergence, self.cause, self.module, self.made_at)])


def bisect(first: Capsule, second: Capsule, replay: Replay) -> Bisection:
    """Name the first difference of two recorded runs as finely as two replays can.

    Raises:
        ConfigError: the runs have other layouts, or no step in common.
        ReplayError: the step could not be made again.
    """
    comparison = compare(first, second)
    found = comparison.divergence
    if found is None:
        return Bisection(comparison.alone)
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
        why = cause(here.replayed, there.replayed, finer)
        return Bisection((recorded, line), 2, finer, why, module, made_at(here.replayed, there.replayed, finer))
    gone = f"{begin}: the replays are equal, so the difference has not come back{_other_programs(here, there)}"
    for capsule, again in ((first, here), (second, there)):
        if again.divergence is not None:
            own = f"each recording against its own replay: {capsule.folder} is not repeated, {_where(again.divergence)}"
            once = Cause(TRANSIENT, f"a result in {capsule.folder} was other than when it was made again", why.evidence)
            return Bisection((recorded, gone, own), 2, again.divergence, once, again.divergence.module)
    both = "each recording against its own replay: equal, as far as all four have recorded the same"
    return Bisection((recorded, gone, both), 2, found, why, found.module)


def require_program(recording: Capsule, step: int, code: Path | None) -> None:
    """Refuse to make a step again with another program than made it, unless that is what was asked for.

    Args:
        code: the checkout that was named for this run; None for the program that is running.

    Raises:
        ConfigError: nothing was named, and this program is another; or what was named is no checkout.
    """
    if code is not None:
        if not (code / source.PACKAGE.name / "cli.py").exists():
            raise ConfigError(f"--code {code} is not a checkout: it holds no {source.PACKAGE.name}/cli.py.")
        return
    recorded = recording.manifest(step)["code"]
    if source.sources_sha256(source.PACKAGE) != recorded["sources_sha256"]:
        raise ConfigError(
            f"{recording.folder} was recorded by another program than this one (source files "
            f"{recorded['sources_sha256'][:12]}). Give a checkout for each run, --code DIR DIR; for this one: "
            f"{source.way_back(recorded, recording.folder)}"
        )


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


def made_at(first: Capsule, second: Capsule, found: Divergence) -> tuple[str, ...]:
    """Which line of source called the operation in which two recordings part: of both, where they have two.

    Against what one of them alone has called stands what the other called instead.
    """
    if found.key.phase is not Phase.OPERATION:
        return ()
    here, there = _calls(first, found), _calls(second, found)
    own, other = (there, here) if found.only_in == "second" else (here, there)
    call = found.key.name, found.key.nth
    pair = [own.get(call), _instead(call, list(own), other)]
    if found.only_in == "second":
        pair.reverse()
    if pair[0] == pair[1]:
        return (str(pair[0]), f"  {pair[0].text}") if pair[0] is not None else ()
    lines = [
        line
        for run, place in zip(("first", "second"), pair, strict=True)
        if place is not None
        for line in (f"{run} run: {place}", f"  {place.text}")
    ]
    return tuple(lines)


def _calls(capsule: Capsule, found: Divergence) -> dict[Call, Place]:
    """Place of every operation of the step, in their order; empty where places were not recorded."""
    names = capsule.names(found.rank)
    frames = (one for one in capsule.frames(found.rank) if one.step == found.step and Flag.START not in one.flags)
    records = next(frames).records
    recorded = [names[record["name"]] for record in records[records["phase"] == Phase.OPERATION]]
    known = places.read(places.path_of(capsule.folder, found.step, found.rank))
    if len(known) != len(recorded):
        return {}
    seen: Counter[str] = Counter()
    calls = {}
    for name, place in zip(recorded, known, strict=True):
        calls[name, seen[name]] = place
        seen[name] += 1
    return calls


def _instead(call: Call, own: list[Call], other: dict[Call, Place]) -> Place | None:
    """Where another run called the same; else what it called behind the last call before it that both have made."""
    if call in other or call not in own:
        return other.get(call)
    calls = list(other)
    before = next((one for one in reversed(own[: own.index(call)]) if one in other), None)
    following = calls[calls.index(before) + 1 :] if before is not None else calls
    return other[following[0]] if following else None


def _surrounding(frame: Frame, names: list[str], index: int) -> str:
    around = [(int(record["phase"]), names[record["name"]].partition(" ")[0]) for record in frame.records]
    for phase, name in around[index:]:
        if phase in (Phase.OUTPUT, Phase.LOSS):
            return f"on the way to the output of {name}"
        if phase in (Phase.OUTPUT_GRADIENT, Phase.LOCAL_GRADIENT):
            break
    before = (name for phase, name in reversed(around[:index]) if phase in (Phase.OUTPUT_GRADIENT, Phase.LOSS))
    return f"behind the gradient of the output of {next(before, 'the model')}"


def _other_programs(*replays: ReplayedStep) -> str:
    """Which of the replays were not made by the program that has recorded them."""
    found = [
        str(one.recording.folder)
        for one in replays
        if one.recording.manifest(one.step)["code"]["sources_sha256"]
        != one.replayed.manifest(one.step)["code"]["sources_sha256"]
    ]
    return f"; another program than in the replay had made {' and '.join(found)}" if found else ""


def _where(found: Divergence) -> str:
    """A difference in a few words."""
    when = f"the start behind step {found.step}" if found.start else f"step {found.step}"
    return f"{when}, rank {found.rank}, {phase_name(found.key.phase)} {found.tensor}"
