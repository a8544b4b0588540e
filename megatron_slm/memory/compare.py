"""Predicted beside measured: the ledger of ``mslm memory`` and that of a step that was taken, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.memory.capacity import GIB, MIB
from megatron_slm.memory.measure import EVERYTHING_ELSE, Measurement
from megatron_slm.memory.static import GRADIENTS, MASTERS, MOMENTS, PARAMETERS

BETWEEN_STEPS = (PARAMETERS, GRADIENTS, MASTERS, MOMENTS)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "MSLM_", "PMI_", "OMPI_")
"""Variables by which a launcher would tell a process that it is a rank."""

NOTABLE = 0.001
"""Share of the whole below which the difference of a layer is left to the files."""

Sizes = Mapping[tuple[str, str], int]
"""(kind, layer) -> bytes at the worst moment."""


class Difference(NamedTuple):
    """One row.

    Attributes:
        measured_bytes: as much as the rest, where a row was not measured by itself.
    """

    kind: str
    layer: str
    predicted_bytes: int
    measured_bytes: int


def differences(predicted: Sizes, measured: Sizes) -> list[Difference]:
    """Every kind and layer that either of them has.

    What a GPU's allocator holds beside the rows between steps is measured as a whole: it is compared as a whole.
    """
    if any(kind == EVERYTHING_ELSE for kind, _ in measured):
        whole: Counter[tuple[str, str]] = Counter()
        for (kind, layer), size in predicted.items():
            whole[(kind, layer) if kind in BETWEEN_STEPS else (EVERYTHING_ELSE, "")] += size
        predicted = whole
    keys = sorted({*predicted, *measured})
    return [Difference(*key, predicted.get(key, 0), measured.get(key, 0)) for key in keys]


def sizes(rows: Iterable[Any], size: str = "size") -> dict[tuple[str, str], int]:
    """Bytes by kind and layer, of rows of a ledger or of their fields as ``mslm memory --json`` writes them."""
    found: Counter[tuple[str, str]] = Counter()
    for row in rows:
        fields = row if isinstance(row, Mapping) else row._asdict()
        found[fields["kind"], fields["layer"]] += fields[size]
    return dict(found)


def table(found: Sequence[Difference]) -> str:
    """One line for each kind, and for each layer in which predicted and measured differ notably."""
    whole = Difference("total", "", sum(row.predicted_bytes for row in found), sum(row.measured_bytes for row in found))
    unit, size = ("GiB", GIB) if whole.measured_bytes >= GIB else ("MiB", MIB)
    lines = [f"{'':<36}{f'predicted {unit}':>15}{f'measured {unit}':>15}{'difference':>12}"]
    for kind in dict.fromkeys(row.kind for row in found):
        same = [row for row in found if row.kind == kind]
        both = sum(row.predicted_bytes for row in same), sum(row.measured_bytes for row in same)
        lines.append(_line(Difference(kind, "", *both), size))
        if len(same) > 1:
            lines += [
                _line(row._replace(kind=f"  {row.layer or '(no layer)'}"), size)
                for row in same
                if abs(row.predicted_bytes - row.measured_bytes) > NOTABLE * whole.measured_bytes
            ]
    return "\n".join([*lines, _line(whole, size)])


def _line(row: Difference, unit: int) -> str:
    predicted, measured = row.predicted_bytes, row.measured_bytes
    difference = f"{100 * (predicted - measured) / measured:+.2f} %" if measured else "not seen"
    exact = "exact" if predicted == measured else difference
    return f"{row.kind:<36}{predicted / unit:>15,.2f}{measured / unit:>15,.2f}{exact:>12}"


class Prediction:
    """``mslm memory`` in a process of its own: this one has a process group, and is no dry world."""

    def __init__(self, command: Sequence[str], written: Path) -> None:
        self._written = written
        written.parent.mkdir(parents=True, exist_ok=True)
        with written.open("w") as out, written.with_suffix(".log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_slm.cli", "memory", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=without_launcher(os.environ),
            )

    def is_over(self) -> bool:
        """Whether it can be read without waiting."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Give it so long to end; then it is ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def text(self) -> str:
        """What it has printed; of a failure, why."""
        failed = self._process.returncode not in (0, 1)  # 1: it does not fit
        return (self._written.with_suffix(".log") if failed else self._written).read_text(encoding="utf-8")

    def of_stage(self, pipeline_rank: int) -> dict[str, Any] | None:
        """The ledger of a pipeline stage as JSON; None when the prediction has failed."""
        try:
            ranks = json.loads(self.text())["ranks"]
        except ValueError:
            return None
        return next((rank for rank in ranks if rank["pipeline_rank"] == pipeline_rank), None)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is nobody's rank and needs no GPU."""
    kept = {name: value for name, value in environment.items() if not name.startswith((*LAUNCHERS, "SLURM_"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def as_json(measurement: Measurement) -> str:
    """A measurement for other ranks and programs."""
    return json.dumps(
        {
            "rank": measurement.rank,
            "pipeline_rank": measurement.pipeline_rank,
            "measured_peak_bytes": measurement.peak_bytes,
            "measured_static_bytes": measurement.static_bytes,
            "measured_reserved_bytes": measurement.reserved_bytes,
            "saved_by_autograd": [
                {"chunk": chunk, "layer": layer, "bytes": size}
                for (chunk, layer), size in sorted(measurement.saved.items())
            ],
            "rows": [{**row._asdict(), "bytes": row.size} for row in measurement.rows],
        },
        indent=1,
    )


def compared(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Difference]:
    """The rows of one pipeline stage, both as JSON."""
    inside = [row for row in predicted["rows"] if row["kind"] not in ("NCCL", "CUDA context", "fragmentation")]
    return differences(sizes(inside, "bytes"), sizes(measured["rows"], "bytes"))
