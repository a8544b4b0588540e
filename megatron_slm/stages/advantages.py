"""Rewards of samples -> advantages of tokens, per convention. Everything in float64, on the device it is given.

Group-relative (GRPO), of a group with rewards r_i, mean m and standard deviation s:

    trl       (r_i - m) / (s + 1e-4), s unbiased               verl      the same with 1e-6
    megatron  (r_i - m) / (s + 1e-4), s of the population
    nemo_rl   (r_i - m_i) / (s_i + 1e-6), m_i and s_i (unbiased) of the others; not divided where s_i = 0

with the mean of the others in the place of m for ``leave_one_out`` (RLOO, arXiv 2402.14740), s over the whole step for
``batch``, and no division for ``none`` (Dr. GRPO, arXiv 2503.20783).

Generalised advantage estimation (arXiv 1506.02438, equation 16), of a sample's rewards r_t and values V_t, V after the
end being 0:

    delta_t = r_t + gamma V_(t+1) - V_t      A_t = delta_t + gamma lambda A_(t+1)      R_t = A_t + V_t

Whitening needs the moments over the tokens of the whole step: each rank gives ``moments`` of its own, their sum over
the ranks goes to ``whiten``. Everything else needs one rank's samples (whole groups) alone, but for
``grpo_scale=batch``, which needs the rewards of all.

Shapes: P prompts, G samples of each; N samples, T tokens of the longest, right-padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.stages.config import GrpoConfig, PpoConfig
from megatron_slm.stages.surrogate import kl_estimate

STD_EPSILON = {"trl": 1e-4, "verl": 1e-6, "megatron": 1e-4, "nemo_rl": 1e-6}
"""Added to the standard deviation of a group."""

VARIANCE_EPSILON = 1e-8
"""Added to the variance when tokens are whitened; the same in all conventions."""


class GroupAdvantages(NamedTuple):
    """Of one step's samples.

    Attributes:
        advantages: [P, G]; 0 of a sample without a reward, and in a group whose rewards are all the same.
        reward_std: [P], unbiased, of each group, whatever the convention; what is logged.
        zero_std: bool [P], groups whose rewards are all the same: they teach nothing.
    """

    advantages: Tensor
    reward_std: Tensor
    zero_std: Tensor


def group_advantages(rewards: Tensor, config: GrpoConfig) -> GroupAdvantages:
    """Compare the samples of each prompt.

    Args:
        rewards: [P, G], NaN where a sample could not be scored: it takes no part, and its advantage is 0. Of all ranks
            with ``grpo_scale=batch``.
    """
    rewards = rewards.double()
    scored = ~rewards.isnan()
    rewards = torch.where(scored, rewards, 0.0)
    std = _std(rewards, scored)
    same = std == 0
    centred = rewards - _baseline(rewards, scored, config.baseline)
    divided = centred if config.grpo_scale == "none" else _scaled(centred, rewards, scored, config)
    advantages = torch.where(scored & ~same[:, None], divided, 0.0)
    return GroupAdvantages(advantages, std, same)


def _baseline(rewards: Tensor, scored: Tensor, kind: str) -> Tensor:
    """[P, G]: what each reward is compared with."""
    sums, counts = rewards.sum(dim=1, keepdim=True), scored.sum(dim=1, keepdim=True)
    if kind == "leave_one_out":
        sums, counts = sums - rewards, counts - 1
    return (sums / counts.clamp(min=1)).expand_as(rewards)


def _scaled(centred: Tensor, rewards: Tensor, scored: Tensor, config: GrpoConfig) -> Tensor:
    epsilon = STD_EPSILON[config.grpo_convention]
    biased = config.grpo_convention == "megatron"
    if config.grpo_scale == "batch":
        return centred / (_std(rewards.flatten(), scored.flatten(), biased=biased) + epsilon)
    if config.grpo_convention != "nemo_rl":
        return centred / (_std(rewards, scored, biased=biased)[:, None] + epsilon)
    size = rewards.shape[1]
    others = scored[:, None, :] & ~torch.eye(size, dtype=torch.bool, device=scored.device)
    std = _std(rewards[:, None, :].expand(-1, size, -1), others)
    return torch.where(std > 0, centred / (std + epsilon), centred)


def _std(rewards: Tensor, scored: Tensor, *, biased: bool = False) -> Tensor:
    """[..., G] -> [...]: of those that are scored; 0 where they are all the same, or none."""
    counts = scored.sum(dim=-1)
    means = torch.where(scored, rewards, 0.0).sum(dim=-1) / counts.clamp(min=1)
    squares = torch.where(scored, (rewards - means[..., None]).square(), 0.0).sum(dim=-1)
    std = (squares / (counts if biased else counts - 1).clamp(min=1)).sqrt()
    highest = torch.where(scored, rewards, -torch.inf).amax(dim=-1)
    lowest = torch.where(scored, rewards, torch.inf).amin(dim=-1)
    # Compared: the mean of equal numbers need not be exactly that number, and 1e-17 is divided by 1e-6 next.
    return torch.where(highest <= lowest, 0.0, std)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, coefficient: float, estimator: str
) -> tuple[Tensor, Tensor]:
    """Rewards and distances from the reference, [N, T] each: the distance's price, and the score at the last token.

    Args:
        scores: [N], of whole samples.
        logprobs, ref_logprobs: [N, T], of the sampled tokens under the policy that sampled them and the reference.
        mask: bool [N, T], the sampled tokens; every sample has one.
        coefficient: ``ppo_kl_coef``, or what it has been steered to.
        estimator: ``ppo_kl_estimator``.
    """
    distances = torch.where(mask, kl_estimate(logprobs.double(), ref_logprobs.double(), estimator), 0.0)
    rewards = -coefficient * distances
    last = mask.int().cumsum(dim=1).eq(mask.sum(dim=1, keepdim=True)) & mask
    return rewards + torch.where(last, scores.double()[:, None], 0.0), distances


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N, T], 0 outside of the mask; a token the mask leaves out takes no step.

    Args:
        rewards, values: [N, T].
        mask: bool [N, T].
    """
    rewards, values = rewards.double(), torch.where(mask, values.double(), 0.0)
    advantages = torch.zeros_like(values)
    after, next_value = values.new_zeros(2, len(values))
    for token in reversed(range(values.shape[1])):
        counts = mask[:, token]
        delta = rewards[:, token] + gamma * next_value - values[:, token]
        after = torch.where(counts, delta + gamma * lambda_ * after, after)
        next_value = torch.where(counts, values[:, token], next_value)
        advantages[:, token] = torch.where(counts, after, 0.0)
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Number, sum and sum of squares of the values in the mask: float64 [3], to be added up over the ranks."""
    chosen = torch.where(mask, values.double(), 0.0)
    return torch.stack([mask.sum().double(), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, mask: Tensor, total: Tensor, *, centred: bool) -> Tensor:
    """Scale to variance 1 (unbiased) over all tokens of the step, [N, T], 0 outside of the mask.

    Args:
        total: ``moments`` of all ranks, [3].
        centred: to mean 0; else the mean is added back.
    """
    count, sums, squares = total
    mean = sums / count.clamp(min=1.0)
    variance = (squares - count * mean.square()).clamp(min=0.0) / (count - 1.0).clamp(min=1.0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + VARIANCE_EPSILON)
    return torch.where(mask, whitened if centred else whitened + mean, 0.0)


def whiten_advantages(advantages: Tensor, mask: Tensor, total: Tensor, config: PpoConfig) -> Tensor:
    """``whiten`` as the convention has it: torchtune adds the mean back."""
    return whiten(advantages, mask, total, centred=config.ppo_convention != "torchtune")


def steered_coefficient(coefficient: float, kl: float, samples: int, config: PpoConfig) -> float:
    """The price of the distance after a step (Ziegler et al., arXiv 1909.08593, section 2.2).

    Args:
        coefficient: before.
        kl: mean distance of the step's samples, in nats a sequence.
        samples: in the step.
    """
    if config.ppo_kl_target is None:
        return coefficient
    error = min(max(kl / config.ppo_kl_target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / config.ppo_kl_horizon)
