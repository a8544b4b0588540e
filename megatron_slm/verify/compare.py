"""Compares what the ranks of a job have left with what one rank has: a claim a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.replay.shards import Shard, assembled
from megatron_slm.verify import updates
from megatron_slm.verify.job import MOMENTS, Outcome, StepNumbers, Tensors
from megatron_slm.verify.report import Claim
from megatron_slm.verify.tolerance import Unit, by_kind, kind

GRADIENTS, NORM = "gradients of step 1", "gradient norm of step 1"


class Reference(NamedTuple):
    """The one-rank job, and itself under rounding errors."""

    plain: Outcome
    perturbed: list[Outcome]


def claims(reference: Reference, found: list[Outcome], precision: str) -> list[Claim]:
    """Everything that is compared of one precision but the resume."""
    unit = Unit(precision)
    return [
        _initial_weights(reference.plain, found, precision),
        *_step_claims(reference, found, unit, 0),
        _tensors(GRADIENTS, reference, found, unit, lambda one: one.gradients),
        _grad_norm(reference, found, unit),
        *_updates(reference, found, unit),
        *(
            _tensors(
                f"optimizer's {name} after step 1",
                reference,
                found,
                unit,
                lambda one, name=name: _after(one).moments[name],  # type: ignore[misc]
                after_norm=True,
            )
            for name in MOMENTS
        ),
        *_step_claims(reference, found, unit, 1),
    ]


def resume_claims(found: list[Outcome], on_one_rank: Tensors, precision: str) -> list[Claim]:
    """What comes out of the checkpoint of the first step: on the same layout, and on one rank."""
    otherwise = sorted({name for one in found for name in one.not_resumed or ()})
    pairs = [
        ("weights", [_after(one).weights for one in found], on_one_rank.weights),
        ("optimizer's weights", [_after(one).masters for one in found], on_one_rank.masters),
        *((name, [_after(one).moments[name] for one in found], on_one_rank.moments[name]) for name in MOMENTS),
    ]
    wrong = [
        f"{name} ({what})"
        for what, shards, whole in pairs
        for name, error in differences(shards, assembled([whole])).items()
        if error
    ]
    return [
        _same_bits("step 2 again from the checkpoint", precision, otherwise),
        _same_bits("the checkpoint read by one rank", precision, wrong),
    ]


def differences(
    found: Iterable[Iterable[Shard]], expected: Mapping[str, Tensor], scale: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Error of every tensor: the norm of its difference in units of the norm of ``scale`` (default ``expected``).

    Of copies on several ranks the worst counts at each element. A tensor that is missing, that one rank does not have,
    or of which nobody owns an element, is infinitely wrong.
    """
    worst = {name: torch.full(tensor.shape, -1.0, dtype=torch.float64) for name, tensor in expected.items()}
    errors: dict[str, float] = {}
    for shard in (shard for rank in found for shard in rank):
        if shard.name not in worst or tuple(worst[shard.name].shape) != shard.shape:
            errors[shard.name] = math.inf
            continue
        there = worst[shard.name][shard.place]
        away = (shard.values.double() - expected[shard.name][shard.place].double()).abs()
        worst[shard.name][shard.place] = torch.maximum(there, away.nan_to_num(nan=-1.0, posinf=math.inf))
    norms = _norms(scale or expected)
    for name, away in worst.items():
        if name not in errors:
            owned = bool((away >= 0.0).all())
            errors[name] = float(away.norm()) / norms[name] if owned else math.inf
    return errors


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """What errors are relative to; a tensor of zeros is measured by the rounding errors of all of them."""
    norms = {name: float(tensor.double().norm()) for name, tensor in tensors.items()}
    smallest = torch.finfo(torch.float64).eps * math.hypot(*norms.values())
    return {name: max(norm, smallest, 1e-300) for name, norm in norms.items()}


def judged(
    name: str,
    unit: Unit,
    errors: Mapping[str, float],
    noise: Sequence[Mapping[str, float]],
    *,
    after_norm: bool,
    least: Mapping[str, float] | None = None,
) -> Claim:
    """A claim about many tensors; its row shows the one that is farthest beyond (or closest to) its tolerance.

    Args:
        least: smallest tolerance of each tensor.
    """
    kinds = by_kind(noise)
    bounds = {
        key: max(unit.tolerance(kinds.get(kind(key), 0.0), after_norm=after_norm), (least or {}).get(key, 0.0))
        for key in errors
    }
    failing = tuple(key for key in errors if not errors[key] <= bounds[key])
    worst = max(errors, key=lambda key: errors[key] / bounds[key])
    return Claim(
        name,
        unit.precision,
        not failing,
        errors[worst],
        bounds[worst],
        f"{worst}{f'; {len(failing)} of {len(errors)} tensors differ' if failing else ''}",
        failing,
        len(failing) == len(errors),
    )


def _initial_weights(plain: Outcome, found: list[Outcome], precision: str) -> Claim:
    """Both jobs start from the same bits."""
    errors = differences([one.start.weights for one in found], assembled([plain.start.weights]))
    wrong = [name for name, error in errors.items() if error]
    row = _same_bits("initial weights", precision, wrong)
    return replace(row, error=max(errors.values()), all_fail=len(wrong) == len(errors))


def _same_bits(name: str, precision: str, wrong: list[str]) -> Claim:
    """A claim that demands the same bits of every tensor."""
    return Claim(name, precision, not wrong, math.inf if wrong else 0.0, 0.0, _listed(wrong), tuple(wrong))


def _step_claims(reference: Reference, found: list[Outcome], unit: Unit, step: int) -> list[Claim]:
    """Every number that the loop logs of a step, and the tokens it is a mean over."""
    plain = reference.plain.steps[step]
    numbers = _first(found, step)
    label = f"of step {step + 1}"
    rows = []
    for name, expected in plain.means.items():
        value = numbers.means.get(name, math.nan)
        noise = _noise_of_mean(reference, step, name)
        bound = unit.tolerance(noise, after_norm=step > 0)
        rows.append(_number(f"{name} {label}", unit.precision, (value, expected), bound))
    same = numbers.tokens == plain.tokens
    text = f"{numbers.tokens} on n ranks, {plain.tokens} on one"
    rows.append(Claim(f"tokens {label}", unit.precision, same, 0.0 if same else math.inf, 0.0, text))
    return rows


def _grad_norm(reference: Reference, found: list[Outcome], unit: Unit) -> Claim:
    plain = reference.plain.steps[0].grad_norm
    noise = max(_relative(one.steps[0].grad_norm, plain) for one in reference.perturbed)
    noise = max(noise, *(_noise_of_norm(reference.plain, one) for one in reference.perturbed))
    values = (_first(found, 0).grad_norm, plain)
    row = _number(NORM, unit.precision, values, unit.tolerance(noise, after_norm=True))
    # Without a gradient every other claim would hold of nothing.
    return row if plain > 0.0 else replace(row, equal=False, error=math.inf, detail="the gradient is zero on one rank")


def _tensors(
    name: str,
    reference: Reference,
    found: list[Outcome],
    unit: Unit,
    pick: Callable[[Outcome], list[Shard]],
    *,
    after_norm: bool = False,
) -> Claim:
    expected = assembled([pick(reference.plain)])
    noise = [differences([pick(one)], expected) for one in reference.perturbed]
    return judged(name, unit, differences(map(pick, found), expected), noise, after_norm=after_norm)


def _updates(reference: Reference, found: list[Outcome], unit: Unit) -> Iterator[Claim]:
    """The model's weights and the optimizer's after the first step."""
    weights, masters = (lambda state: state.weights), (lambda state: state.masters)
    allowed: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
    if unit.precision != "fp64":  # its gradients' errors are far below Adam's epsilon
        allowed = _leeway(reference, unit.precision)
    yield _update("weights after step 1", reference, found, unit, weights, allowed[0])
    yield _update("optimizer's weights after step 1", reference, found, unit, masters, allowed[1])


def _leeway(reference: Reference, precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What rounding may change in each element of the model's weights and of the optimizer's."""
    plain = reference.plain
    before, after = assembled([plain.start.masters]), assembled([_after(plain).masters])
    moment, *moments = (assembled([_after(one).moments[MOMENTS[0]]]) for one in (plain, *reference.perturbed))
    allowed = updates.leeway(before, after, moment, moments, precision)
    return updates.stored_leeway(after, allowed, precision), allowed


def _update(
    name: str,
    reference: Reference,
    found: list[Outcome],
    unit: Unit,
    pick: Callable[[Tensors], list[Shard]],
    allowed: Mapping[str, Tensor],
) -> Claim:
    """Weights, in units of what the step has changed: beside the weights themselves an update is small."""
    before, after = (assembled([pick(state)]) for state in (reference.plain.start, _after(reference.plain)))
    change = {key: after[key].double() - before[key].double() for key in after}
    noise = []
    for one in reference.perturbed:
        own, then = (assembled([pick(state)]) for state in (one.start, _after(one)))
        moved = [Shard(key, tuple(then[key].shape), (), then[key].double() - own[key].double()) for key in then]
        noise.append(differences([moved], change))
    norms = _norms(change)
    least = {key: float(tensor.norm()) / norms[key] for key, tensor in allowed.items()}
    errors = differences([pick(_after(one)) for one in found], after, change)
    return judged(name, unit, errors, noise, after_norm=True, least=least)


def _noise_of_mean(reference: Reference, step: int, name: str) -> float:
    """Relative change of a logged mean in the perturbed runs.

    Errors of single micro-batches are added in quadrature: their signs may happen to cancel in the sum.
    """
    count = len(reference.plain.sums) // len(reference.plain.steps)
    plain = [sums[name] for sums in reference.plain.sums[step * count : (step + 1) * count]]
    scale = abs(math.fsum(plain)) or 1.0
    worst = 0.0
    for one in reference.perturbed:
        theirs = [sums[name] for sums in one.sums[step * count : (step + 1) * count]][::-1]
        spread = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(theirs, plain, strict=True))) / scale
        worst = max(worst, spread, _relative(one.steps[step].means[name], reference.plain.steps[step].means[name]))
    return worst


def _noise_of_norm(plain: Outcome, other: Outcome) -> float:
    """Relative change of the global norm, the changes of single tensors' squared norms added in quadrature."""
    squares = [
        {name: float(tensor.double().norm()) ** 2 for name, tensor in assembled([one.gradients]).items()}
        for one in (plain, other)
    ]
    total = math.fsum(squares[0].values()) or 1.0
    spread = math.sqrt(math.fsum((squares[1][name] - square) ** 2 for name, square in squares[0].items()))
    return spread / (2.0 * total)


def _number(name: str, precision: str, values: tuple[float, float], bound: float) -> Claim:
    """A claim about one number."""
    value, expected = values
    error = _relative(value, expected)
    return Claim(name, precision, error <= bound, error, bound, f"{value:.10g} on n ranks, {expected:.10g} on one")


def _relative(value: float, expected: float) -> float:
    error = abs(value - expected) / (abs(expected) or 1.0)
    return math.inf if math.isnan(error) else error


def _first(found: list[Outcome], step: int) -> StepNumbers:
    """The numbers of a step, which every rank logs alike; where they do not, one that is not rank 0's."""
    numbers = [one.steps[step] for one in found]
    return next((other for other in numbers if other != numbers[0]), numbers[0])


def _after(one: Outcome) -> Tensors:
    assert one.after is not None, "a job takes a step before its outcome is read"
    return one.after


def _listed(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
