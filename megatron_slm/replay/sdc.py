"""``mslm replay sdc``: recorded steps made again on the same and on permuted ranks, to find what was computed wrongly.

Every chosen step is made again where it was made, and with its logical ranks moved on to other places (``slots.py``).
Both repeat a sound recording. What one of the three alone has otherwise was wrong once; a place that is always wrong
strikes another rank when the ranks are moved. Where three do not tell, further ones are made. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Divergence
from megatron_slm.replay.report import SHOWN, phase_name
from megatron_slm.replay.rerun import restored_difference
from megatron_slm.replay.slots import Explanation, Making, Origins, Parting, explanations, parting, placement
from megatron_slm.replay.step import ReplayedStep, begins_from, recorded_steps

Replay = Callable[[int, int, int], ReplayedStep]
"""(step, attempt, places) -> that step made again, every rank so many places further on."""
FURTHER = 2
"""Replays of a step that are added at most where the first ones do not tell."""
TRANSIENT, PERSISTENT, UNDECIDED, UNEXPLAINED = "transient", "persistent", "undecided", "unexplained"
RECORDED = "the recorded run"


@dataclass(frozen=True)
class Finding:
    """One difference, and whose it is.

    Attributes:
        divergence: the first record that differs between two of the makings.
        origins: the ranks at which it began.
        makings: the recorded run, and every replay.
        found: all explanations that hold.
        although: what was not the same for recording and replays, in words.
    """

    divergence: Divergence
    origins: Origins
    makings: tuple[Making, ...]
    found: tuple[Explanation, ...]
    although: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``TRANSIENT``, ``PERSISTENT``, ``UNDECIDED`` or ``UNEXPLAINED``."""
        if not self.found:
            return UNEXPLAINED
        if not decided(self.found):
            return UNDECIDED
        return PERSISTENT if self.found[0].persistent else TRANSIENT

    def __str__(self) -> str:
        found = self.divergence
        start = "the start behind step" if found.start else "step"
        ranks = ", ".join(_ranks(group) for group in self.origins)
        lines = [f"{start} {found.step}, {ranks}, {phase_name(found.key.phase)}, {found.tensor}"]
        if not self.found:
            lines.append(
                "  unexplained: no single place accounts for it; choices that are not deterministic, or several faults"
            )
        elif self.verdict == UNDECIDED:
            lines.append(f"  undecided{self._why()}; either")
            lines += [f"    {self._words(one)}" for one in self.found[:SHOWN]]
        else:
            # Of several that name one slot, the one that was struck most often.
            lines.append(f"  {self._words(max(self.found, key=lambda one: len(one.struck)))}")
        return "\n".join([*lines, *(f"  although other: {fact}" for fact in self.although[:SHOWN])])

    def _why(self) -> str:
        count = len(self.makings[0].placement)
        return {1: ": one rank cannot be moved", 2: ": two ranks can be exchanged only"}.get(count, "")

    def _words(self, one: Explanation) -> str:
        where = [(self.makings[number], self.makings[number].placement.index(one.slot)) for number in one.struck]
        if not one.persistent:
            making, rank = where[0]
            return f"transient, in {making.name}: rank {rank} on {one.slot}"
        struck = ", ".join(f"rank {rank} in {making.name}" for making, rank in where)
        return f"persistent, {one.slot}: {struck}"


def hunt(
    recording: Capsule, every: int, replay: Replay, *, rotations: Sequence[int] = (1,)
) -> tuple[list[int], list[Finding]]:
    """Make every ``every``-th recorded step again, on the same slots and rotated.

    Steps behind one checkpoint are made again together, and every recorded step on the way is compared.

    Args:
        rotations: by how many places ranks are moved, a replay each; none to stay on the same slots.

    Returns:
        The chosen steps, and one finding for each stretch behind a checkpoint that differs.

    Raises:
        ConfigError: there is no such step, or a rotation moves nothing or goes beyond the ranks.
        CheckpointError: a rank's stream is missing.
        ReplayError: a step could not be made again.
    """
    chosen = [step for step in recorded_steps(recording) if step % every == 0]
    if not chosen:
        raise ConfigError(f"--every {every}: {recording.folder} holds no step that is a multiple of {every}.")
    count = len(recording.ranks)
    recording.require_streams()
    if other := [places for places in rotations if not 0 < places < max(count, 2)]:
        can = f"{count} ranks can be moved by 1 to {count - 1} slots" if count > 1 else "one rank cannot be moved"
        raise ConfigError(f"--rotate {other[0]}: {can}; leave it out to move all of them by one.")
    wanted = [0, *(places for places in rotations if count > 1)]
    stretches = {begins_from(recording, step): step for step in chosen}  # the last one behind each checkpoint
    findings = (_judged(recording, step, replay, wanted) for step in stretches.values())
    return chosen, [finding for finding in findings if finding is not None]


def decided(found: Sequence[Explanation]) -> bool:
    """Whether all explanations name one slot, and either all one and the same making or all several."""
    transient = {one.struck for one in found if not one.persistent}
    return len({one.slot for one in found}) == 1 and len(transient) + any(one.persistent for one in found) == 1


class _Evidence:
    """The makings of one step, and where each two of them part."""

    def __init__(self, recording: Capsule, step: int) -> None:
        self.step = step
        self.makings = [Making(RECORDED, placement(recording, step))]
        self.partings: dict[tuple[int, int], Parting] = {}
        self.replays: list[ReplayedStep] = []
        self._capsules = [recording]

    def add(self, made: ReplayedStep, places: int) -> None:
        """Take in one replay, which was made with ranks moved by so many places."""
        number = len(self._capsules)
        for before, capsule in enumerate(self._capsules):
            restored = None if before else restored_difference(capsule, made.replayed, made.start)
            self.partings[before, number] = parting(capsule, made.replayed, restored)
        self._capsules.append(made.replayed)
        self.replays.append(made)
        moved = f" with ranks moved by {places}" if places else ""
        self.makings.append(Making(f"replay {number}{moved}", placement(made.replayed, self.step)))

    @property
    def equal(self) -> bool:
        """Whether every making gave the same."""
        return not any(parting.origins for parting in self.partings.values())

    def found(self) -> list[Explanation]:
        """The explanations that hold so far."""
        pairs = {pair: parting.origins for pair, parting in self.partings.items()}
        return explanations([making.placement for making in self.makings], pairs)

    def finding(self) -> Finding:
        """What can be said of a step that was not always the same."""
        parted = [(one.divergence, one.origins) for one in self.partings.values() if one.divergence is not None]
        first, origins = min(parted, key=lambda pair: (pair[0].step, pair[0].order()))
        although = tuple(str(fact) for fact in self.replays[0].circumstances)
        return Finding(first, origins, tuple(self.makings), tuple(self.found()), although)


def _judged(recording: Capsule, step: int, replay: Replay, rotations: Sequence[int]) -> Finding | None:
    """Make one step again, as often as it takes to tell."""
    evidence = _Evidence(recording, step)
    attempts = chain(rotations, islice(_further(rotations, len(recording.ranks)), FURTHER))
    for attempt, places in enumerate(attempts, 1):
        if attempt > len(rotations) and (evidence.equal or _told(evidence)):
            break
        evidence.add(replay(step, attempt, places), places)
    return None if evidence.equal else evidence.finding()


def _told(evidence: _Evidence) -> bool:
    """Whether further replays would say no more; nothing that no slot explains gets better by them."""
    found = evidence.found()
    return not found or decided(found)


def _further(rotations: Sequence[int], count: int) -> Iterator[int]:
    """Rotations that may tell where those have not: others, then the same again."""
    if any(rotations):
        yield from (places for places in range(1, count) if places not in {one % count for one in rotations})
    yield from reversed(rotations)
    yield from rotations


def _ranks(group: frozenset[int]) -> str:
    return f"rank {' or '.join(map(str, sorted(group)))}"
