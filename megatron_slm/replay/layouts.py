"""``mslm replay layout-diff``: two runs of one configuration whose ranks have cut the model otherwise.

Sums are taken in another order, so bits differ, and nothing of one rank compares with anything of another. What does
compare is what every layout has under one name: the samples of each step, its loss and gradient norm, and in a
checkpoint every global tensor (core's key). Errors are relative, in units of a tolerance that is measured: how far the
first run itself goes when its initial weights are moved by one unit in the last place (``perturbed.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.errors import ConfigError
from megatron_slm.replay.cause import NO_CAUSE
from megatron_slm.replay.global_names import kind_of, module_of, parts_of, place_of
from megatron_slm.replay.perturbed import INITIAL
from megatron_slm.train import metrics, publish
from megatron_slm.train.payload import read_tensor
from megatron_slm.train.payload_index import group_of, is_weight, read_index
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.saved_state import read_state

Tolerance = Callable[[float], float]
"""The largest relative error that counts as equal, of the error that rounding alone has made."""
OF_THE_LAYOUT = ("parallel.", "train.micro_batch_size", "checkpoint.")
NUMBERS = ("loss", "gradient norm")
UPDATES = 4.0
"""Two runs whose gradients differ throughout part by about twice what each has moved its weights."""


class Deviation(NamedTuple):
    """Something that differs by more than rounding does: a step's number, or a tensor after a step."""

    step: int
    name: str
    error: float
    """Relative."""
    tolerance: float

    @property
    def ratio(self) -> float:
        """The error in units of the tolerance; 0 where rounding alone leaves nothing to compare."""
        return self.error / self.tolerance if math.isfinite(self.tolerance) else 0.0

    @property
    def module(self) -> str:
        """The module that a tensor belongs to."""
        return module_of(self.name)

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        fields = {**self._asdict(), "ratio": self.ratio, "module": self.module}
        return {key: str(value) if value == math.inf else value for key, value in fields.items()}


@dataclass(frozen=True)
class LayoutDifference:
    """What two runs have not in common, beside their layouts.

    Attributes:
        layouts: of both, in words.
        steps: completed steps of the checkpoints that both have, oldest first.
        settings: what their configurations have not in common, beside the layout.
        samples: the first step in which other samples were read; nothing else is compared then.
        numbers: the first loss and the first gradient norm that deviate.
        tensors: those that deviate in the first checkpoint in which one does, in the order of the model.
        displaced: weights among them that are farther apart than updates have moved them since the start; each with
            ``UPDATES`` times that way as its tolerance.
        compared: tensors of a checkpoint.
        largest: the largest error in units of its tolerance in the newest checkpoint.
    """

    layouts: tuple[str, str]
    steps: tuple[int, ...]
    settings: tuple[str, ...] = ()
    samples: int | None = None
    numbers: tuple[Deviation, ...] = ()
    tensors: tuple[Deviation, ...] = ()
    displaced: tuple[Deviation, ...] = ()
    compared: int = 0
    largest: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether all is within its tolerance."""
        return self.samples is None and not self.numbers and not self.tensors

    @property
    def worst(self) -> Deviation | None:
        """The tensor that is farthest beyond its tolerance; of equals, the first in the model.

        A weight that no update has brought there comes before all others: it was wrong before they were.
        """
        return max(self.displaced or self.tensors, key=lambda one: one.ratio, default=None)

    @property
    def loss_parted(self) -> int | None:
        """The first step whose loss deviates."""
        return next((one.step for one in self.numbers if one.name == NUMBERS[0]), None)

    def render(self) -> str:
        """The verdict in words."""
        return "\n".join([*self._verdict(), *(f"  although other: {fact}" for fact in self.settings)])

    def _verdict(self) -> list[str]:
        between = f"{self.layouts[0]} against {self.layouts[1]}"
        if self.samples is not None:
            return [
                f"DIFFERENT: {between}",
                f"  data           other samples from step {self.samples} on; no more compared",
            ]
        if self.equal:
            return [
                f"equal within tolerance: {between}; losses and gradient norms of steps 1 to {self.steps[-1]}, "
                f"{self.compared} tensors after it, the farthest at {self.largest:.2g} of its tolerance"
            ]
        lines = [f"DIFFERENT: {between}"]
        lines += [f"  {one.name:<14} of step {one.step}: {_beyond(one)}" for one in self.numbers]
        if (worst := self.worst) is None:
            return [*lines, f"  tensors        after step {self.steps[-1]} within tolerance"]
        first = self.tensors[0]
        return [
            *lines,
            f"  {'displaced' if self.displaced else 'most deviating':<14} {worst.name} after step {worst.step}: "
            + (f"{worst.ratio:.3g} x {_DISPLACED}" if self.displaced else _beyond(worst)),
            f"  its module     {worst.module}",
            f"  first in model {first.name}: {_beyond(first)}",
            f"  tensors        {len(self.tensors)} of {self.compared} deviate after step {worst.step}",
            f"  loss           {_of_loss(self.loss_parted)}",
        ]

    def to_json(self) -> str:
        """The same as one JSON line."""
        record = asdict(self) | {
            "equal": self.equal,
            "loss_parted": self.loss_parted,
            "numbers": [one.record() for one in self.numbers],
            "worst": self.worst.record() if self.worst else None,
            "tensors": [one.record() for one in self.tensors],
            "displaced": [one.record() for one in self.displaced],
            "largest": self.largest if math.isfinite(self.largest) else str(self.largest),
        }
        return json.dumps(record)


_DISPLACED = f"{UPDATES:g} times what all updates have moved it by: it was other from the start"


def _of_loss(step: int | None) -> str:
    """What the step in which the loss has parted says."""
    if step == 1:
        return "parts in step 1: the weights that both begin with, or the forward pass"
    when = "does not part" if step is None else f"parts in step {step}, not before"
    return f"{when}: the forward pass is right; look at gradients, their reduction and the optimizer"


def layout_diff(
    runs: tuple[Path, Path],
    reference: Callable[[Sequence[int]], Path],
    tolerance: Callable[[str], Tolerance],
    *,
    at: int | None = None,
) -> LayoutDifference:
    """Compare two runs up to their newest common checkpoint.

    Args:
        reference: the steps of common checkpoints -> the first run under rounding errors; asked once the data agree.
        tolerance: of a precision ("fp32", "bf16").
        at: completed steps of the common checkpoint to end at; default the newest.

    Raises:
        ConfigError: no checkpoint in common, or the reference has not got the last of them.
        CheckpointError: something is damaged.
    """
    steps = _common_steps(runs, at)
    paths = [publish.published(run / "checkpoints")[steps[-1]] for run in runs]
    states = [read_state(path) for path in paths]
    layouts = (_words(states[0].layout), _words(states[1].layout))
    found = LayoutDifference(layouts, steps, _other_settings(paths[0], paths[1]))
    records = [_records(run, steps[-1]) for run in runs]
    if (samples := _other_samples(*records)) is not None:
        return replace(found, samples=samples)
    perturbed = reference(steps)
    judge = tolerance("bf16" if states[0].params_dtype == "bfloat16" else "fp32")
    numbers = tuple(_deviating_numbers(records[0], records[1], _records(perturbed, steps[-1]), judge))
    three = (*runs, perturbed)
    newest = _of_checkpoint(three, steps[-1], judge)
    found = replace(found, numbers=numbers, compared=len(newest), largest=max(one.ratio for one in newest))
    return found if found.largest <= 1.0 else _located(found, three, newest, judge)


def _located(
    found: LayoutDifference, runs: tuple[Path, Path, Path], newest: list[Deviation], tolerance: Tolerance
) -> LayoutDifference:
    """With the first checkpoint in which a tensor deviates: a difference spreads, and is seen best where it begins."""
    saved = publish.published(runs[2] / "checkpoints")
    earlier = (_of_checkpoint(runs, step, tolerance) for step in found.steps[:-1] if step in saved)
    first = next((all_ for all_ in earlier if any(one.ratio > 1.0 for one in all_)), newest)
    initial = publish.published(runs[2].with_name(INITIAL) / "checkpoints").get(1)
    return replace(
        found,
        tensors=tuple(one for one in first if one.ratio > 1.0),
        displaced=() if initial is None else tuple(_displaced(runs, initial, first[0].step, tolerance(0.0))),
        compared=len(first),
    )


def _common_steps(runs: tuple[Path, Path], at: int | None) -> tuple[int, ...]:
    first, second = (publish.published(run / "checkpoints") for run in runs)
    common = sorted({*first} & {*second})
    if at is not None and at not in common:
        raise ConfigError(f"--at {at}: the runs have the checkpoints of steps {common or 'none'} in common.")
    if not common:
        raise ConfigError(
            f"{runs[0]} has checkpoints of steps {sorted(first)}, {runs[1]} of {sorted(second)}: none in common. Save "
            "both with one checkpoint.save_interval."
        )
    return tuple(step for step in common if at is None or step <= at)


def _other_settings(*checkpoints: Path) -> tuple[str, ...]:
    """Keys, with both values, of which the configurations may compute something else under any layout."""
    first, second = (asdict(load(path / "config.yaml").config) for path in checkpoints)
    keys = [(section, key) for section, values in first.items() if isinstance(values, dict) for key in values]
    return tuple(
        f"{section}.{key}: {first[section][key]} and {second[section][key]}"
        for section, key in keys
        if first[section][key] != second[section][key]
        and not f"{section}.{key}".startswith(OF_THE_LAYOUT)
        and not f"config.{section}.{key}".startswith(NO_CAUSE)
    )


def _records(run: Path, last: int) -> dict[int, dict[str, Any]]:
    """What the run has logged of each step up to ``last``.

    Raises:
        ConfigError: nothing.
    """
    path = RunDirectory(run).metrics
    if not path.exists():
        raise ConfigError(f"{path} is missing: losses are compared with it. Name the directories of two runs.")
    return {record["step"]: record for record in metrics.read_records(path) if record["step"] <= last}


def _other_samples(first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The first step of which the digests of all samples so far differ."""
    both = sorted({*first} & {*second})
    return next((step for step in both if first[step]["sample_digest"] != second[step]["sample_digest"]), None)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    norm = record["grad_norm"]
    return dict(zip(NUMBERS, (float.fromhex(record["lm_loss_bits"]), math.nan if norm is None else norm), strict=True))


def _deviating_numbers(
    first: Mapping[int, Mapping[str, Any]],
    second: Mapping[int, Mapping[str, Any]],
    perturbed: Mapping[int, Mapping[str, Any]],
    tolerance: Tolerance,
) -> Iterator[Deviation]:
    """The first loss, and the first gradient norm, that deviate."""
    for name in NUMBERS:
        noise = 0.0
        for step in sorted({*first} & {*second} & {*perturbed}):
            mine, theirs, moved = (_numbers(run[step])[name] for run in (first, second, perturbed))
            # Errors do not shrink for good; in one step two runs may come close by chance.
            noise = max(noise, _relative(moved, mine))
            error = _relative(theirs, mine)
            if error > tolerance(noise):
                yield Deviation(step, name, error, tolerance(noise))
                break


def _relative(value: float, expected: float) -> float:
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return 0.0
    error = abs(value - expected) / max(abs(expected), 1e-300)
    return math.inf if math.isnan(error) else error


def _of_checkpoint(runs: tuple[Path, Path, Path], step: int, tolerance: Tolerance) -> list[Deviation]:
    """Error and tolerance of every tensor after a step, in the order of the model; one of each run in memory at a time.

    Raises:
        ConfigError: the third run has no checkpoint of the step.
    """
    if step not in (there := publish.published(runs[2] / "checkpoints")):
        raise ConfigError(f"{runs[2]} has checkpoints of steps {sorted(there)}, not of {step}; give another reference.")
    paths = [publish.published(run / "checkpoints")[step] for run in runs]
    indices = [read_index(path) for path in paths]
    errors: dict[str, float] = {}
    noise: dict[str, float] = {}
    names = dict.fromkeys(name for index in indices[:2] for name in index.tensors if group_of(name) != "random")
    for name in names:
        shapes = {index.tensors[name].shape if name in index.tensors else None for index in indices}
        if len(shapes) > 1:
            errors[name] = math.inf
            continue
        tensors = [read_tensor(path, index, name) for path, index in zip(paths, indices, strict=True)]
        for (part, mine), (_, theirs), (_, moved) in zip(*(parts_of(name, one) for one in tensors), strict=True):
            errors[part] = _difference(theirs, mine)
            kind = kind_of(part)
            noise[kind] = max(noise.get(kind, 0.0), _difference(moved, mine))
    found = [Deviation(step, name, error, tolerance(noise.get(kind_of(name), 0.0))) for name, error in errors.items()]
    return sorted(found, key=lambda one: place_of(one.name))


def _displaced(runs: tuple[Path, Path, Path], initial: Path, step: int, least: float) -> Iterator[Deviation]:
    """Weights of the first two runs that are farther apart after ``step`` than the first one has come since its start.

    Args:
        initial: checkpoint of the weights with which the first run began.
        least: smallest tolerance.
    """
    paths = [*(publish.published(run / "checkpoints")[step] for run in runs[:2]), initial]
    indices = [read_index(path) for path in paths]
    for name in filter(is_weight, indices[0].tensors):
        if len({index.tensors[name].shape if name in index.tensors else None for index in indices}) > 1:
            continue
        tensors = [read_tensor(path, index, name) for path, index in zip(paths, indices, strict=True)]
        for (part, mine), (_, theirs), (_, begun) in zip(*(parts_of(name, one) for one in tensors), strict=True):
            bound = max(UPDATES * _difference(begun, mine), least)
            if (error := _difference(theirs, mine)) > bound:
                yield Deviation(step, part, error, bound)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference in units of the norm of ``expected``."""
    away, norm = float((found.double() - expected.double()).norm()), float(expected.double().norm())
    if away == 0.0:
        return 0.0
    error = away / norm if norm else math.inf
    return math.inf if math.isnan(error) else error


def _words(layout: Mapping[str, int]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in layout.items() if size > 1 and axis != "world_size") or "1 rank"


def _beyond(one: Deviation) -> str:
    return f"{one.ratio:.3g} x its tolerance ({one.error:.2g} against {one.tolerance:.2g}, relative)"
