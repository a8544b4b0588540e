"""``mslm replay sdc``: recorded steps made again on the same ranks, to find results that were computed wrongly once.

A step that its replay does not repeat is made a second time. What two of the three agree on is taken for right. No
torch. A fault that is there every time is repeated by every replay on the same machine, and is not found so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Divergence, first_divergence
from megatron_slm.replay.report import phase_name
from megatron_slm.replay.step import ReplayedStep, begins_from, recorded_steps

Replay = Callable[[int, int], ReplayedStep]
"""(step, attempt) -> that step made again."""
STRUCK = "the recorded run was struck: two replays agree with each other and not with it"
REPLAY_STRUCK = "a replay was struck: another one repeats the recording"
UNSTABLE = "not repeatable: three times three results, so a choice that is not deterministic, or a failing device"


@dataclass(frozen=True)
class Finding:
    """One difference, and whose it is."""

    divergence: Divergence
    verdict: str

    def __str__(self) -> str:
        found = self.divergence
        return (
            f"step {found.step}, rank {found.rank}, {phase_name(found.key.phase)}, {found.tensor}\n    {self.verdict}"
        )


def hunt(recording: Capsule, every: int, replay: Replay) -> tuple[list[int], list[Finding]]:
    """Make every ``every``-th recorded step again.

    Steps behind one checkpoint are made again together, and every recorded step on the way is compared.

    Returns:
        The chosen steps, and one finding for each stretch behind a checkpoint that differs.

    Raises:
        ConfigError: there is no such step.
        ReplayError: a step could not be made again.
    """
    chosen = [step for step in recorded_steps(recording) if step % every == 0]
    if not chosen:
        raise ConfigError(f"--every {every}: {recording.folder} holds no step that is a multiple of {every}.")
    stretches = {begins_from(recording, step): step for step in chosen}  # the last one behind each checkpoint
    findings = []
    for step in stretches.values():
        once = replay(step, 1)
        if once.divergence is None:
            continue
        twice = replay(step, 2)
        findings.append(Finding(once.divergence, _verdict(once, twice)))
    return chosen, findings


def _verdict(once: ReplayedStep, twice: ReplayedStep) -> str:
    if twice.divergence is None:
        return REPLAY_STRUCK
    return STRUCK if first_divergence(once.replayed, twice.replayed) is None else UNSTABLE
