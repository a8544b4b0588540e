"""``mslm replay show --step``: what one rank did in a step, and with which samples. No torch."""

from __future__ import annotations

from megatron_slm.errors import ConfigError
from megatron_slm.replay import places
from megatron_slm.replay.capsule import FOLDER, Capsule
from megatron_slm.replay.report import frame_text
from megatron_slm.replay.stream import Flag, Frame, Phase


def step_text(capsule: Capsule, step: int, rank: int) -> str:
    """Every record of a step on a rank in the order of execution, below the positions of the samples it was made from.

    Raises:
        ConfigError: there is no such rank, or it has not recorded that step.
    """
    if rank not in capsule.ranks:
        raise ConfigError(f"--rank {rank}: {capsule.folder} has ranks {capsule.ranks[0]} to {capsule.ranks[-1]}.")
    frames = [frame for frame in capsule.frames(rank) if frame.step in (step - 1, step)]
    own = [frame for frame in frames if frame.step == step]
    if not own:
        raise ConfigError(f"--step {step} was not recorded; mslm replay show {capsule.folder} lists the steps.")
    names = capsule.names(rank)
    made = places.read(places.path_of(capsule.folder, step, rank))
    texts = [frame_text(frame, names, made) for frame in own]
    ends = {frame.step: _consumed(frame, names) for frame in frames if Flag.START not in frame.flags}
    begun, ended = 0 if step == 1 else ends.get(step - 1), ends.get(step)
    if begun is not None and ended is not None and begun < ended:
        config = capsule.folder.parent / "config.yaml" if capsule.folder.name == FOLDER else "CONFIG"
        texts.insert(
            0,
            f"step {step} of all ranks reads train positions {begun} to {ended - 1}; the first of them:\n"
            f"  mslm data inspect {config} --index {begun}",
        )
    return "\n".join(texts)


def _consumed(frame: Frame, names: list[str]) -> int | None:
    """Samples that the run had consumed at the end of a step; unknown where the step was thinned."""
    if Flag.ROOTS in frame.flags:
        return None
    own = (record for record in frame.records if record["phase"] == Phase.STEP)
    return next((int(record["lanes"][0]) for record in own if names[record["name"]] == "consumed"), None)
