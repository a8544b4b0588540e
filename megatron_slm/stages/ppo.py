"""Proximal policy optimization (arXiv 1707.06347) as used for language models (InstructGPT, arXiv 2203.02155).

Over the T sampled labels of the whole global batch, with the ratio r of a token's probabilities now and when it was
sampled, its advantage A, return R and old value V_old, all of the rollout (``advantages.py``), and the entropy H

    policy  1/T sum of -min(r A, clip(r, 1 - e, 1 + e) A) - c_H H                                  equation 7
    critic  c_V/2 1/T sum of max((V - R)^2, (V_old + clip(V - V_old, -e_V, e_V) - R)^2)     openai/baselines, ppo2

Policy and critic are two models with an optimizer each, so there are two losses.

Shapes: B micro-batch, S sequence of this cp rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import ENTROPY, LOGPROB
from megatron_slm.stages.config import PpoConfig
from megatron_slm.stages.segments import Loss, logged_pair
from megatron_slm.stages.surrogate import Clip, clipped, clipped_shares, log_ratio

LOGGED = ("loss", "policy/approxkl", "policy/clipfrac", "policy/entropy", "val/ratio")
"""What ``loss`` logs: TRL's names."""

VALUE_LOGGED = ("loss", "val/clipfrac", "val/error", "val/mean")
"""What ``value_loss`` logs."""


def loss(output: Tensor, batch: Batch, *, config: PpoConfig, cp: Any = None) -> Loss:
    """The policy's (sum of the loss, sampled labels, what to log).

    Args:
        output: [3, B, S] of ``TokenScores``, at the temperature and within the kept set of the rollout.
        batch: ``loss_mask``, ``advantages``, ``old_logprobs`` [B, S].
        cp: not needed: every label is counted where it lies.
    """
    counted = batch["loss_mask"] != 0
    logprobs, old, advantages = (
        torch.where(counted, values.to(output.dtype), 0.0)
        for values in (output[LOGPROB], batch["old_logprobs"], batch["advantages"])
    )
    entropy = torch.where(counted, output[ENTROPY], 0.0)
    log_ratios = log_ratio(logprobs, old, config.log_ratio_limit)
    ratio = log_ratios.exp()
    clip = Clip(1.0 - config.ppo_clip, 1.0 + config.ppo_clip, config.dual_clip)
    losses = clipped(ratio, advantages, clip) - config.ppo_entropy_coef * entropy
    low, high = clipped_shares(ratio, advantages, clip)
    tokens = counted.sum()
    # The advantages of what does not count are 0, and so is its loss.
    total = losses.sum()
    found = {
        "loss": total,
        "policy/approxkl": log_ratios.square().sum() / 2,
        "policy/clipfrac": (low | high).sum(),
        "policy/entropy": entropy.sum(),
        "val/ratio": torch.where(counted, ratio, 0.0).sum(),
    }
    return total, tokens.to(torch.int), {name: logged_pair(found[name], tokens) for name in LOGGED}


def value_loss(output: Tensor, batch: Batch, *, config: PpoConfig, cp: Any = None) -> Loss:
    """The critic's (sum of the loss, sampled labels, what to log).

    Args:
        output: [B, S] of ``Scalar``: the value before the label is drawn.
        batch: ``loss_mask``, ``returns``, ``old_values`` [B, S].
        cp: not needed: every label is counted where it lies.
    """
    counted = batch["loss_mask"] != 0
    values, returns, old = (
        torch.where(counted, numbers.to(output.dtype), 0.0)
        for numbers in (output, batch["returns"], batch["old_values"])
    )
    errors = (values - returns).square()
    losses = errors
    if config.ppo_value_clip:
        bounded = torch.maximum(torch.minimum(values, old + config.ppo_value_clip), old - config.ppo_value_clip)
        losses = torch.maximum(errors, (bounded - returns).square())
    tokens = counted.sum()
    total = config.ppo_value_coef / 2 * losses.sum()
    found = {
        "loss": total,
        "val/clipfrac": (losses > errors).sum(),
        "val/error": errors.sum(),
        "val/mean": values.sum(),
    }
    return total, tokens.to(torch.int), {name: logged_pair(found[name], tokens) for name in VALUE_LOGGED}
