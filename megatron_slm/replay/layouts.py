"""``mslm replay layout-diff``: two runs of one configuration whose ranks have cut the model otherwise.

Sums are taken in another order, so bits differ, and nothing of one rank compares with anything of another. What does
compare is what every layout has under one name: the samples of each step, its loss and gradient norm, and in a
checkpoint every global tensor (core's key). Errors are relative, in units of a tolerance that is measured: how far the
first run itself goes when its initial weights are moved by one unit in the last place (``perturbed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.errors import ConfigError
from megatron_slm.replay.capsule import require_directory
from megatron_slm.replay.cause import NO_CAUSE
from megatron_slm.replay.global_names import kind_of, parts_of, place_of
from megatron_slm.replay.layout_report import LOSS, UPDATES, Deviation, LayoutDifference, Origin
from megatron_slm.replay.perturbed import INITIAL
from megatron_slm.train import metrics, publish
from megatron_slm.train.payload import read_tensor
from megatron_slm.train.payload_index import group_of, is_weight, read_index
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.saved_state import read_state

Tolerance = Callable[[float], float]
"""The largest relative error that counts as equal, of the error that rounding alone has made."""
OF_THE_LAYOUT = ("parallel.", "train.micro_batch_size", "checkpoint.")
NUMBERS = (LOSS, "gradient norm")


Locate = Callable[[tuple[Path, Path], Sequence[int]], Iterable[Origin]]
"""(two runs, completed steps of their common checkpoints) -> where each deviates from one rank."""


def layout_diff(
    runs: tuple[Path, Path],
    reference: Callable[[Sequence[int]], Path],
    tolerance: Callable[[str], Tolerance],
    *,
    at: int | None = None,
    locate: Locate | None = None,
) -> LayoutDifference:
    """Compare two runs up to their newest common checkpoint.

    Args:
        reference: the steps of common checkpoints -> the first run under rounding errors; asked once the data agree.
        tolerance: of a precision ("fp32", "bf16").
        at: completed steps of the common checkpoint to end at; default the newest.
        locate: asked where a difference comes from; default nobody is.

    Raises:
        ConfigError: no checkpoint in common, or the reference has not got the last of them; dropout is on;
            the models are not one.
        CheckpointError: something is damaged.
    """
    steps = _common_steps(runs, at)
    paths = [publish.published(run / "checkpoints")[steps[-1]] for run in runs]
    states = [read_state(path) for path in paths]
    layouts = (_words(states[0].layout), _words(states[1].layout))
    _refuse_dropout(paths)
    settings = _other_settings(paths[0], paths[1])
    _refuse_other_models(runs, paths, settings)
    found = LayoutDifference(layouts, steps, settings)
    records = [_records(run, steps[-1]) for run in runs]
    if (samples := _other_samples(*records)) is not None:
        return replace(found, samples=samples)
    perturbed = reference(steps)
    judge = tolerance("bf16" if states[0].params_dtype == "bfloat16" else "fp32")
    numbers = tuple(_deviating_numbers(records[0], records[1], _records(perturbed, steps[-1]), judge))
    three = (*runs, perturbed)
    newest = _of_checkpoint(three, steps[-1], judge)
    found = replace(found, numbers=numbers, compared=len(newest), largest=max(one.ratio for one in newest))
    if found.largest > 1.0:
        found = _with_tensors(found, three, newest, judge)
    return found if found.equal or locate is None else replace(found, origins=tuple(locate(runs, steps)), looked=True)


def _with_tensors(
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
    for run in runs:
        require_directory(run)
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


def _refuse_dropout(checkpoints: Sequence[Path]) -> None:
    """Refuse runs of which no two layouts compute the same.

    Raises:
        ConfigError: one of them has dropout.
    """
    for path in checkpoints:
        model = load(path / "config.yaml").config.model
        for key in ("hidden_dropout", "attention_dropout"):
            if rate := getattr(model, key):
                raise ConfigError(
                    f"model.{key} = {rate} in {path.parent.parent}: each rank draws its own masks, so no two layouts "
                    f"compute the same. Compare runs with model.{key}=0."
                )


def _refuse_other_models(runs: tuple[Path, Path], checkpoints: Sequence[Path], settings: Sequence[str]) -> None:
    """Refuse runs whose configurations ask for other tensors: no layout makes one model of two.

    Raises:
        ConfigError: names the keys.
    """
    keys = [one for one in settings if one.startswith("model.")]
    shapes = [{name: spec.shape for name, spec in read_index(path).tensors.items()} for path in checkpoints]
    weights = {name for index in shapes for name in index if is_weight(name)}
    if keys and any(shapes[0].get(name) != shapes[1].get(name) for name in weights):
        raise ConfigError(
            f"{runs[0]} and {runs[1]} are not one configuration under two layouts, but other models: "
            f"{'; '.join(keys)}. Compare runs that differ in parallel.* alone."
        )


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
