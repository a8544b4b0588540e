"""A picture of a job's memory: stacked bars of the pipeline stages, and the busiest stage through a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_slm.memory.capacity import GIB
from megatron_slm.memory.ledger import Ledger
from megatron_slm.memory.report import COLUMNS, columns


def plot(found: Sequence[Ledger], file: Path) -> None:
    """Draw it to ``file``; its suffix says the format."""
    from matplotlib.figure import Figure  # a second of import

    figure = Figure(figsize=(10, 8), layout="constrained")
    stages, step = figure.subplots(2, 1)
    labels = [str(one.pipeline_rank) for one in found]
    bottom = [0.0] * len(found)
    for name in COLUMNS:
        heights = [columns(one)[name] / GIB for one in found]
        stages.bar(labels, heights, bottom=bottom, label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    capacity = next((one.surroundings.capacity_bytes for one in found if one.surroundings), None)
    if capacity is not None:
        stages.axhline(capacity / GIB, color="black", linestyle="--", label="capacity")
    stages.set(xlabel="pipeline stage", ylabel="GiB", title="one rank of every pipeline stage at its worst moment")
    stages.legend(fontsize="small", ncols=4)
    busiest = max(found, key=lambda one: one.size)
    moments = busiest.timeline.moments
    step.step(range(1, len(moments) + 1), [moment.peak_bytes / GIB for moment in moments], where="mid", label="most")
    starts = [moment.start_bytes / GIB for moment in moments]
    step.step(range(1, len(moments) + 1), starts, where="mid", label="when the turn begins")
    step.axhline(busiest.timeline.static_bytes / GIB, color="gray", linestyle=":", label="between steps")
    title = f"allocated through a step, pipeline stage {busiest.pipeline_rank}"
    step.set(xlabel="turn of the schedule", ylabel="GiB", title=title, ylim=(0, None))
    step.legend(fontsize="small")
    figure.savefig(file)
