"""What PPO and GRPO share: ratios of a policy to the one that sampled, their clips, distances between policies.

With the ratio r of a sampled token's probabilities and its advantage A, the clipped surrogate is (PPO, arXiv
1707.06347, equation 7, with two bounds as in DAPO, arXiv 2503.14476, equation 8)

    -min(r A, clip(r, lower, upper) A)

and with a dual clip c it is at most -c A where A < 0 (arXiv 1912.09729). The estimates of KL(p, p_ref) from a token
drawn from p, with d = log p_ref - log p, are (joschu.net/blog/kl-approx.html)

    k1  -d        k2  d^2 / 2        k3  exp(d) - d - 1        abs  |d|

All functions are elementwise; tokens that do not count have been set to 0 before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clip(NamedTuple):
    """Bounds on the ratio.

    Attributes:
        lower, upper: the smallest and the largest that the clip lets pass.
        dual: the largest that counts where the advantage is negative; None for any.
    """

    lower: float
    upper: float
    dual: float | None = None


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, limit: float | None = None) -> Tensor:
    """log r, cut to the absolute value ``limit`` (verl: 20), beyond which it has no gradient."""
    difference = logprobs - old_logprobs
    return difference if limit is None else difference.clamp(-limit, limit)


def clipped(ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """The clipped surrogate, to be minimised."""
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(clip.lower, clip.upper) * advantages)
    if clip.dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -clip.dual * advantages), losses)


def clipped_shares(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Where the clip took the gradient: below (and the advantage is negative), above (and it is positive)."""
    return (ratio < clip.lower) & (advantages < 0), (ratio > clip.upper) & (advantages > 0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, *, bounded: bool = False) -> Tensor:
    """Distance of a policy from its reference in nats.

    Args:
        estimator: k1, k2, k3 or abs.
        bounded: verl's k3: d within 20, the estimate within 10.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "abs":
        return difference.abs()
    if not bounded:
        return difference.exp() - difference - 1.0
    difference = difference.clamp(-20.0, 20.0)
    return (difference.exp() - difference - 1.0).clamp(-10.0, 10.0)
