"""What the policy losses of GRPO and PPO read, made of a rollout's rewards: advantages, and the critic's targets.

On the ranks that end the model alone. Shapes: P prompts of this copy, G samples of each, N = P x G, B micro-batch, S
slots, T labels of the longest sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.stages.advantages import (
    generalised_advantages,
    group_advantages,
    moments,
    token_rewards,
    whiten,
    whiten_advantages,
)
from megatron_slm.stages.config import GrpoConfig, PpoConfig
from megatron_slm.stages.experience import Experience, of_all_copies, sums_over_copies
from megatron_slm.stages.sequences import gather, labels_of, scatter
from megatron_slm.train.step import StepPlan


def group_fields(found: Experience, config: GrpoConfig, plan: StepPlan) -> dict[str, float]:
    """``advantages`` of GRPO. Collective over dp."""
    totals = torch.tensor([one.total for one in found.judged], dtype=torch.float64, device=plan.device)
    everyone, own = of_all_copies(totals, plan)
    compared = group_advantages(everyone.view(-1, found.group_size).cpu(), config)
    advantages = compared.advantages.flatten()[own].tolist()
    for batch, members in zip(found.batches, found.owners, strict=True):
        batch["advantages"] = found.spread(advantages, batch, members)
    if config.grpo_drop_zero_std:
        same = compared.zero_std.repeat_interleave(found.group_size)[own].tolist()
        found.leave_out(same)
    return {"frac_reward_zero_std": float(compared.zero_std.double().mean())}


class _Targets(NamedTuple):
    """Of one micro-batch: where its sequences' labels lie, and what is known of them, [N, T]."""

    places: Tensor
    mask: Tensor
    rewards: Tensor
    distances: Tensor
    values: Tensor


def critic_fields(found: Experience, config: PpoConfig, coefficient: float, plan: StepPlan) -> dict[str, float]:
    """``advantages`` and ``returns`` of PPO, from ``old_values`` and, with a price on it, ``ref_logprobs``.

    Collective over dp.

    Args:
        coefficient: the price of a nat of distance from the reference, now.
    """
    penalty = config.ppo_missing_eos_penalty
    totals = [
        one.total - (0.0 if each.completion.finished else penalty)
        for one, each in zip(found.judged, found.drawn, strict=True)
    ]
    targets = []
    for batch, members in zip(found.batches, found.owners, strict=True):
        places, mask = labels_of(batch, len(members))
        scores = torch.tensor([totals[at] for at in members], dtype=torch.float64, device=plan.device)
        old = gather(batch["old_logprobs"], places, mask)
        reference = gather(batch["ref_logprobs"], places, mask) if "ref_logprobs" in batch else old
        rewards, distances = (
            token_rewards(scores, old, reference, mask, coefficient=coefficient, estimator=config.ppo_kl_estimator)
            if mask.numel()
            else (torch.zeros(mask.shape, dtype=torch.float64, device=plan.device),) * 2
        )
        targets.append(_Targets(places, mask, rewards, distances, gather(batch["old_values"], places, mask)))
    if config.ppo_whiten_rewards:
        total = _total([moments(one.rewards, one.mask) for one in targets], plan)
        targets = [one._replace(rewards=whiten(one.rewards, one.mask, total, centred=False)) for one in targets]
    learned = [
        generalised_advantages(one.rewards, one.values, one.mask, gamma=config.ppo_gamma, lambda_=config.ppo_lambda)
        for one in targets
    ]
    if config.ppo_whiten_advantages:
        total = _total(
            [moments(advantages, one.mask) for (advantages, _), one in zip(learned, targets, strict=True)], plan
        )
        learned = [
            (whiten_advantages(advantages, one.mask, total, config), returns)
            for (advantages, returns), one in zip(learned, targets, strict=True)
        ]
    for batch, one, (advantages, returns) in zip(found.batches, targets, learned, strict=True):
        like = batch["segments"]
        batch["advantages"] = scatter(advantages, one.places, one.mask, like)
        batch["returns"] = scatter(returns, one.places, one.mask, like)
    logged = _objective(targets, [returns for _, returns in learned], plan)
    if not all("ref_logprobs" in batch for batch in found.batches):
        logged.pop("objective/kl", None)  # compared with itself it is 0, which would pass for a measurement
    return logged


def _total(parts: list[Tensor], plan: StepPlan) -> Tensor:
    """Moments [3] of all micro-batches and copies."""
    total = torch.stack(parts).sum(dim=0)
    dist.all_reduce(total, group=plan.groups.dp)
    return total


def _objective(targets: list[_Targets], returns: list[Tensor], plan: StepPlan) -> dict[str, float]:
    """TRL's numbers of the rollout: distance and reward of a sequence, and how well the critic foresaw the returns."""
    errors = torch.zeros(9, dtype=torch.float64, device=plan.device)
    for one, back in zip(targets, returns, strict=True):
        left = torch.where(one.mask, back - one.values.double(), 0.0)
        kept = torch.where(one.mask, back, 0.0)
        rows = one.mask.any(dim=1).sum() if one.mask.numel() else torch.zeros((), device=plan.device)
        rewards = torch.where(one.mask, one.rewards, 0.0)
        errors += torch.stack(
            [
                rows.double(),
                one.distances.sum(),
                rewards.sum(),
                one.mask.sum().double(),
                left.sum(),
                left.square().sum(),
                kept.sum(),
                kept.square().sum(),
                one.values.double().sum(),
            ]
        )
    totals = sums_over_copies(errors.tolist(), plan)
    sequences, distance, reward, labels, error, error2, target, target2, values = totals
    if not sequences:
        return {}
    spread = target2 / labels - (target / labels) ** 2
    unexplained = error2 / labels - (error / labels) ** 2
    return {
        "objective/kl": distance / sequences,
        "objective/rlhf_reward": reward / sequences,
        "val/explained_var": 1.0 - unexplained / spread if spread > 0.0 else math.nan,
        "val/mean_of_rollout": values / labels,
    }
