"""How far rounding alone may take the weights of a step: what Adam makes of gradients that it cannot tell from zero.

The first step of Adam moves every element by about the learning rate, whatever its gradient's size: an element whose
gradient is of the size of its rounding errors moves up in one layout and down in another. Two perturbed runs show that
of few elements; here it is reckoned for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_slm.verify.tolerance import FACTOR, kind

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision -> format of the model's weights; the optimizer's are fp32 in both."""

Whole = Mapping[str, Tensor]


def leeway(before: Whole, after: Whole, moment: Whole, perturbed: Iterable[Whole], precision: str) -> dict[str, Tensor]:
    """Largest change of each element of the optimizer's weights that rounding may cause in the first step.

    Args:
        before: the optimizer's weights before the step, on one rank.
        after: and after it.
        moment: ``exp_avg`` after the step, on one rank: the gradient that was used, times a constant.
        perturbed: the same of the perturbed runs.
        precision: "fp32" or "bf16".
    """
    noise = _noise(moment, list(perturbed))
    found = {}
    for name, weight in after.items():
        moved = (weight - before[name]).double().abs()
        ulp = torch.finfo(weight.dtype).eps * weight.double().abs()
        undecided = moment[name].double().abs() <= FACTOR[precision] * noise[kind(name)]
        undecided &= moved > 0.0  # nothing has reached what has not moved at all, as the rows of unused tokens
        found[name] = ulp + undecided * 2.0 * moved.max()
    return found


def stored_leeway(masters: Whole, allowed: Whole, precision: str) -> dict[str, Tensor]:
    """The same of the model's weights: an element close to the middle of two numbers is stored as one or the other."""
    found = {}
    for name, master in masters.items():
        low, kept, high = (
            (master.double() + sign * allowed[name]).float().to(STORED[precision]).double() for sign in (-1, 0, 1)
        )
        found[name] = torch.maximum(high - kept, kept - low)
    return found


def _noise(plain: Whole, perturbed: list[Whole]) -> dict[str, float]:
    """Root mean square of what rounding changes in an element that it changes, by kind of tensor."""
    worst: dict[str, float] = {}
    for name, tensor in plain.items():
        for other in perturbed:
            away = (other[name].double() - tensor.double()).abs()
            away = away[away > 0.0]
            rms = float(away.square().mean().sqrt()) if away.numel() else 0.0
            worst[kind(name)] = max(worst.get(kind(name), 0.0), rms)
    return worst
