"""Where a run parts from one rank, by numbers: the first steps of each of two runs made again, and held against it.

A checkpoint shows what a step has left, and a backward pass mixes everything: a fault of the forward pass is in all
gradients at once. So steps are kept whole (``replay/witness.py``) and read in the order in which they were computed:
weights, module outputs, loss, their gradients, the parameters' gradients, their norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_slm.config.load import Resolved, load
from megatron_slm.replay.layout_report import Origin
from megatron_slm.replay.perturbed import (
    INITIAL,
    PERTURBED,
    begun_from,
    like,
    moved_weights,
    place_beside,
    trained,
    with_sections,
)
from megatron_slm.replay.rerun import Start, anew, directory_of
from megatron_slm.replay.shards import Shard, assembled
from megatron_slm.replay.witness import Witnessed, read, steps_in
from megatron_slm.train import metrics, publish
from megatron_slm.train.run_directory import RunDirectory, locked
from megatron_slm.train.saved_state import read_state
from megatron_slm.verify import setting
from megatron_slm.verify.compare import GRADIENTS, NORM, differences, judged
from megatron_slm.verify.diagnose import LOSS, execution_order, first_difference, first_parameter
from megatron_slm.verify.report import Claim
from megatron_slm.verify.tolerance import Unit

STEPS = 2
"""What is made again: a copy that was not brought up to date after the first step shows in the second."""
COPIES, WEIGHTS = "copies", "weights"
ALIKE = 1e-3
"""Gradients that are one multiple of what they should be are so to rounding; others are not even nearly."""


@dataclass
class Workplace:
    """The runs that are made again, beside the first of the two that are compared.

    Attributes:
        own: the first run.
        last: steps of each that are needed; a run that has kept them whole itself is not made again.
    """

    folder: Path
    own: Path
    start: Start
    last: int
    _references: dict[int, tuple[Path, Path]] = field(default_factory=dict)

    def run(self, name: str, run: Path, checkpoint: Path) -> Path:
        """The first steps of a run, kept whole."""
        return run if self._has(run) else self._kept(like(checkpoint, self.folder / name, last=self.last))

    def reference(self, checkpoint: Path) -> tuple[Path, Path]:
        """The same on one rank, and under rounding errors; once for each size of a micro-batch."""
        size = _micro_batch_size(checkpoint)
        if size not in self._references:
            own, moved = self.own, place_beside(self.own) / PERTURBED
            if not (_is_alone(own) and _micro_batch_size(_any(own)) == size and self._has(own) and self._has(moved)):
                own, moved = self._made(checkpoint, self.folder / str(size))
            self._references[size] = own, moved
        return self._references[size]

    def _made(self, checkpoint: Path, folder: Path) -> tuple[Path, Path]:
        weights = moved_weights(_on_one_rank(like(checkpoint, folder / INITIAL, last=1)), self.start)
        alone = _on_one_rank(like(checkpoint, folder / "plain", last=self.last))
        moved = _on_one_rank(like(checkpoint, folder / PERTURBED, last=self.last))
        return self._kept(alone), self._kept(begun_from(weights, moved))

    def _has(self, run: Path) -> bool:
        return {*range(1, self.last + 1)} <= {*steps_in(run)}

    def _kept(self, resolved: Resolved) -> Path:
        """Run it; its directory."""
        replay = dataclasses.replace(resolved.config.replay, whole_steps=self.last)
        trained(self.start, with_sections(resolved, replay=replay), self.last)
        return directory_of(resolved)


def origins(runs: tuple[Path, Path], steps: Sequence[int], start: Start) -> Iterator[Origin]:
    """Of each run that deviates from one rank, where it does so first.

    Args:
        steps: completed steps of the checkpoints that both have.
        start: trains one configuration on as many ranks as it says.

    Raises:
        ReplayError: a run has failed.
        CheckpointError: nothing can be written beside the first run.
    """
    folder = place_beside(runs[0]) / "first-steps"
    with locked(RunDirectory(folder)):
        anew(folder)
        workplace = Workplace(folder, runs[0], start, min(STEPS, steps[-1]))
        for index, run in enumerate(runs):
            checkpoint = publish.published(run / "checkpoints")[steps[-1]]
            if _is_alone(run):
                continue
            plain, moved = workplace.reference(checkpoint)
            again = workplace.run(("first", "second")[index], run, checkpoint)
            config = load(checkpoint / "config.yaml").config
            judge = Judge(Unit(setting.own_precision(config)), gated=config.model.swiglu)
            found = (
                judge.first(step, read(plain, step)[0], read(moved, step)[0], read(again, step))
                for step in range(1, workplace.last + 1)
            )
            if (origin := next(filter(None, found), None)) is not None:
                yield origin._replace(run=index, repeated=_losses(again, 1) == _losses(run, 1))


def _any(run: Path) -> Path:
    """A checkpoint of a run."""
    return next(iter(publish.published(run / "checkpoints").values()))


def _is_alone(run: Path) -> bool:
    """Whether a run has one rank."""
    return bool(read_state(_any(run)).layout["world_size"] == 1)


def _micro_batch_size(checkpoint: Path) -> int:
    return load(checkpoint / "config.yaml").config.train.micro_batch_size


def _on_one_rank(resolved: Resolved) -> Resolved:
    config = setting.one_rank(resolved.config)
    return with_sections(resolved, parallel=config.parallel, train=config.train)


def _losses(run: Path, last: int) -> list[str]:
    """Bits of the first losses that a run has logged."""
    records = metrics.read_records(RunDirectory(run).metrics)
    return [record["lm_loss_bits"] for record in records if record["step"] <= last]


@dataclass(frozen=True)
class Judge:
    """How steps are compared."""

    unit: Unit
    gated: bool

    def first(self, step: int, plain: Witnessed, moved: Witnessed, found: Sequence[Witnessed]) -> Origin | None:
        """Where the ranks of a step first hold something else than one rank does."""
        order = execution_order(plain.watched)
        if drifted := drifted_copies([one.weights for one in found]):
            row = Claim(COPIES, self.unit.precision, False, math.inf, 0.0, failing=tuple(drifted))
            ranks = drifted[_of_module(drifted, module := first_parameter(row, order, ""))]
            return Origin(
                step, module, COPIES, f"rank {ranks[1]} has begun the step with another copy than rank {ranks[0]}"
            )
        expected = assembled([plain.weights])
        errors = [differences([one.weights for one in ranks], expected) for ranks in (found, [moved])]
        row = judged(WEIGHTS, self.unit, errors[0], errors[1:], after_norm=True)
        if not row.equal:
            return Origin(
                step,
                first_parameter(row, order, "every weight"),
                WEIGHTS,
                f"the step begins with other weights: {row.detail}",
            )
        rows = [*self._numbers(step, plain, moved, found[-1]), self._gradients(plain, moved, found)]
        finding = first_difference(rows, plain, [moved], found, self.unit.precision, gated=self.gated)
        if finding is None:
            return None
        return Origin(step, finding.module, finding.direction, self._detail(finding.direction, plain, found, rows))

    def _numbers(self, step: int, plain: Witnessed, moved: Witnessed, found: Witnessed) -> Iterator[Claim]:
        """Claims about the loss and the gradient norm, as ``first_difference`` looks for them."""
        three = (plain, moved, found)
        for name, values in (
            ("lm loss of step 1", [one.loss for one in three]),
            (NORM, [one.grad_norm for one in three]),
        ):
            noise, error = (abs(value - values[0]) / (abs(values[0]) or 1.0) for value in values[1:])
            bound = self.unit.tolerance(noise, after_norm=step > 1 or name == NORM)
            detail = f"{values[2]:.7g} instead of {values[0]:.7g}"
            yield Claim(name, self.unit.precision, error <= bound, error, bound, detail)

    def _gradients(self, plain: Witnessed, moved: Witnessed, found: Sequence[Witnessed]) -> Claim:
        expected = assembled([plain.gradients])
        noise = differences([moved.gradients], expected)
        return judged(
            GRADIENTS, self.unit, differences([one.gradients for one in found], expected), [noise], after_norm=False
        )

    def _detail(self, direction: str, plain: Witnessed, found: Sequence[Witnessed], rows: Sequence[Claim]) -> str:
        """What is told beside the place."""
        row = next((row for row in rows if not row.equal and row.name == GRADIENTS), None)
        if direction != "gradient" or row is None:
            failing = next((row for row in rows if not row.equal and row.name != GRADIENTS), None)
            return failing.detail if failing is not None and direction in (LOSS, "gradient") else ""
        expected, mine = assembled([plain.gradients]), assembled(one.gradients for one in found)
        names = [name for name in row.failing if name in mine and name in expected]
        factor = common_factor([mine[name] for name in names], [expected[name] for name in names])
        what = "all gradients are" if row.all_fail else f"{len(row.failing)} gradients are"
        return row.detail if factor is None else f"{what} {factor:.4g} times one rank's"


def drifted_copies(ranks: Sequence[Sequence[Shard]]) -> Mapping[str, tuple[int, int]]:
    """Name -> two ranks that hold the same part of a weight with other values; in the order of the names."""
    held: dict[tuple[str, str], tuple[int, Tensor]] = {}
    found: dict[str, tuple[int, int]] = {}
    for rank, shards in enumerate(ranks):
        for one in shards:
            first, values = held.setdefault((one.name, str(one.place)), (rank, one.values))
            if not values.equal(one.values):
                found.setdefault(one.name, (first, rank))
    return found


def common_factor(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The one number by which all of ``expected`` are to be multiplied; None where there is none."""
    pairs = [(mine.double(), one.double()) for mine, one in zip(found, expected, strict=True) if float(one.norm())]
    if not pairs:
        return None
    factor = sum(float((mine * one).sum()) for mine, one in pairs) / sum(float(one.square().sum()) for _, one in pairs)
    away = max(float((mine - factor * one).norm() / one.norm()) for mine, one in pairs)
    return factor if away <= ALIKE * abs(factor) else None


def _of_module(names: Mapping[str, tuple[int, int]], module: str) -> str:
    return next((name for name in names if name.startswith(module)), next(iter(names)))
