"""What a comparison and a recording say: for a reader, and as JSON lines. No torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import Cause
from megatron_slm.replay.diff import Comparison, Divergence
from megatron_slm.replay.places import Place
from megatron_slm.replay.stream import Flag, Frame, Phase

SHOWN = 8
"""Facts that are listed as evidence."""


def divergence_text(found: Divergence, why: Cause, module: str | None = None, made_at: Sequence[str] = ()) -> str:
    """A paragraph: where, after what, and why.

    Args:
        module: where it is known better than by the tensor's name.
        made_at: lines that say where in the source the tensor was made.
    """
    when = f"the start behind step {found.step}" if found.start else f"step {found.step}"
    micro_batch = f", micro-batch {found.key.micro_batch}" if found.key.phase in BY_MICRO_BATCH else ""
    also = f"; later in it also rank {', '.join(map(str, found.others))}" if found.others else ""
    lines = [
        f"first difference: {when}, rank {found.rank}{also}",
        f"  phase     {phase_name(found.key.phase)}{micro_batch}",
        f"  module    {module or found.module}",
        f"  tensor    {found.key.name}" + (f" (only in the {found.only_in} run)" if found.only_in else ""),
        *(f"  {'' if number else 'made at':<9} {line}" for number, line in enumerate(made_at)),
        f"  inputs    {_inputs(found)}",
        f"  cause     {why.kind}: {why.why}",
    ]
    lines += [f"            {fact}" for fact in why.evidence[:SHOWN]]
    if len(why.evidence) > SHOWN:
        lines.append(f"            and {len(why.evidence) - SHOWN} more")
    return "\n".join(lines)


def compared_text(comparison: Comparison) -> str:
    """How much was compared, and what one of the runs alone has."""
    lines = [str(comparison), *comparison.alone]
    return "\n".join(f"  {'' if number else 'compared':<9} {line}" for number, line in enumerate(lines))


def divergence_json(found: Divergence, why: Cause) -> str:
    """The same as one JSON line."""
    record = {
        "step": found.step,
        "start": found.start,
        "rank": found.rank,
        "phase": phase_name(found.key.phase),
        "micro_batch": found.key.micro_batch,
        "module": found.module,
        "tensor": found.tensor,
        "record": found.key.name,
        "index": found.index,
        "inputs_equal": found.inputs_equal,
        "only_in": found.only_in,
        "also_on_ranks": list(found.others),
        "cause": why.kind,
        "why": why.why,
        "evidence": [vars(fact) for fact in why.evidence],
    }
    return json.dumps(record, default=str)


def capsule_text(capsule: Capsule) -> str:
    """What was recorded: each start with its layout, and of each rank its steps."""
    lines = [
        f"{capsule.folder}: {_start_words(capsule.manifest(1))}",
        *(f"  from step {step + 1} on: {_start_words(capsule.manifest(step + 1))}" for step in capsule.starts[1:]),
        f"{'rank':>5} {'steps':>15} {'frames':>7} {'records a step':>15} {'thinned':>8}",
    ]
    for rank in capsule.ranks:
        frames = [frame for frame in capsule.frames(rank) if Flag.START not in frame.flags]
        steps = f"{frames[0].step} to {frames[-1].step}" if frames else "none"
        records = len(frames[-1].records) if frames else 0
        thinned = sum(Flag.ROOTS in frame.flags for frame in frames)
        lines.append(f"{rank:>5} {steps:>15} {len(frames):>7} {records:>15} {thinned:>8}")
    lines += [f"{rank:>5} {'missing':>15}" for rank in capsule.missing]
    return "\n".join(lines)


def _start_words(manifest: Mapping[str, Any]) -> str:
    layout = " x ".join(f"{axis} {size}" for axis, size in manifest["layout"].items())
    return f"{manifest['config']['replay']['level']}, {manifest['world_size']} ranks ({layout})"


def frame_text(frame: Frame, names: list[str], made: Sequence[Place] = ()) -> str:
    """Every record of a frame, a line each; ``made`` are the places of its operations."""
    places = iter(made)
    flags = f" ({', '.join(str(flag.name).lower() for flag in Flag if flag in frame.flags)})" if frame.flags else ""
    header = f"  {'phase':<16} {'mb':>4}  {'fingerprint or value':<34} tensor (mb: micro-batch)"
    lines = [f"step {frame.step}{flags}", header]
    for record in frame.records:
        phase, name = Phase(int(record["phase"])), names[record["name"]] if len(names) else ""
        first, second = (int(lane) for lane in record["lanes"])
        shown = f"{first:016x} {second:016x}"
        if Flag.ROOTS in frame.flags:
            name = "(root)"
        elif phase is Phase.STEP:
            shown = _value(name, first, second)
        elif phase is Phase.OPERATION and (place := next(places, None)) is not None:
            name = f"{name:<48} {place}"
        lines.append(f"  {phase_name(phase):<16} {record['micro_batch']:>4}  {shown:<34} {name}")
    return "\n".join(lines)


def phase_name(phase: Phase) -> str:
    """As it is printed."""
    return phase.name.lower().replace("_", " ")


BY_MICRO_BATCH = (Phase.BATCH, Phase.OUTPUT, Phase.LOSS, Phase.OUTPUT_GRADIENT)


def _inputs(found: Divergence) -> str:
    if found.start and not found.step:
        return "none: nothing came before it, the state was built from the configuration and the seed"
    if found.start:
        return f"the checkpoint of step {found.step}: no step came between"
    if found.inputs_equal is None:
        return f"not known: what step {found.step - 1} has left was not recorded by both"
    return (
        f"equal: on this rank {found.index} records of the step before it, on every rank what came before, and the "
        f"state after step {found.step - 1}"
    )


def _value(name: str, first: int, second: int) -> str:
    if name == "loss":
        return f"{_float(first):.9g} over {second} tokens"
    if name == "grad_norm":
        return f"{_float(first):.9g}, learning rate {_float(second):.9g}"
    return f"{first} samples, {second} tokens"


def _float(bits: int) -> Any:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]
