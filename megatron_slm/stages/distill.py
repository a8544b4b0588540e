"""Distillation: a student follows a teacher's next-token distribution, given or drawn by the student itself.

With D the divergence of a token (forward KL for beta 0, reverse KL for 1, generalised JSD between; arXiv 2306.13649,
equation 1) and a the share of the cross-entropy (arXiv 1503.02531), over the T labels of the whole global batch

    1/T sum of (1 - a) D + a (-log q(y_t))

Both at the one temperature, without a factor for it. A running teacher's D comes from ``parallel/vocab_divergence.py``.
Of a stored one the log-probabilities of its K most probable tokens are known, and D is that of the K probabilities and
what is left of both (``bucket``): as merging tokens never adds divergence, a lower bound of the whole D. Without the
rest (``ignore``) D sums over the K alone and may be negative.

Shapes: B micro-batch, S sequence of this cp rank, K tokens of a stored teacher.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_divergence import AGREEMENT, DIVERGENCE, ENTROPY, FORWARD, LOGPROB, REVERSE
from megatron_slm.stages.config import DistillConfig
from megatron_slm.stages.segments import Loss, logged_pair

LOGGED = ("loss", "nll", "kl/forward", "kl/reverse", "entropy", "agreement@1")
"""What ``loss`` logs; ``nll`` is the labels' cross-entropy."""

STORED_LOGGED = ("loss", "nll", "kl/forward", "kl/reverse", "entropy", "mean_token_accuracy")
"""What ``stored_loss`` logs; the distances are those of the K tokens."""

LABEL = 0
"""Where ``stored_loss`` finds the log-probability of the label; those of the teacher's tokens come behind it."""

MOST = -1e-7
"""Largest logarithm of the mass of K tokens: what they leave of 1 must have a logarithm in fp32."""

NOWHERE = -50.0
"""Log-probability of either model where a label does not count, so that nothing but a number goes through."""


def loss(output: Tensor, batch: Batch, *, config: DistillConfig, cp: Any = None) -> Loss:
    """(sum of the loss, labels, what to log), with a teacher that runs.

    Args:
        output: [6, B, S] of ``vocab_parallel_divergence``.
        batch: ``loss_mask`` [B, S].
        cp: not needed: every label is counted where it lies.
    """
    counted = batch["loss_mask"] != 0
    values = torch.where(counted, output, 0.0)
    found = dict(zip(LOGGED[2:], values[[FORWARD, REVERSE, ENTROPY, AGREEMENT]], strict=True))
    return _mixed(values[DIVERGENCE], -values[LOGPROB], found, counted, config)


def stored_loss(output: Tensor, batch: Batch, *, config: DistillConfig, cp: Any = None) -> Loss:
    """The same with a stored teacher.

    Args:
        output: [K + 3, B, S] of ``vocab_parallel_scores`` with K + 1 labels a token: the label, then ``teacher_ids``.
        batch: ``loss_mask`` [B, S]; ``teacher_logprobs`` [B, S, K], at the temperature.
        cp: not needed: every label is counted where it lies.
    """
    counted = batch["loss_mask"] != 0
    scores = torch.where(counted, output, 0.0)
    student, teacher = (
        torch.where(counted[..., None], logprobs, NOWHERE)
        for logprobs in (output[1:-2].movedim(0, -1), batch["teacher_logprobs"].to(output.dtype))
    )
    if config.teacher_tail == "bucket":
        student, teacher = _with_rest(student), _with_rest(teacher)
    values = divergence(teacher, student, config.distill_beta)
    shown = divergence(teacher, student, 0.0), divergence(teacher, student, 1.0), scores[-2], scores[-1]
    found = dict(zip(STORED_LOGGED[2:], shown, strict=True))
    return _mixed(values, -scores[LABEL], found, counted, config)


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """[..., K] log-probabilities of both -> [...], the generalised JSD of the module's first line, in nats."""
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(logs: Tensor, other: Tensor) -> Tensor:
    return (logs.exp() * (logs - other)).sum(dim=-1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """[..., K] -> [..., K + 1]: the logarithm of what the K probabilities leave of 1 comes behind them."""
    mass = torch.logsumexp(logprobs, dim=-1, keepdim=True).clamp(max=MOST)
    return torch.cat([logprobs, (-torch.expm1(mass)).log()], dim=-1)


def _mixed(values: Tensor, nll: Tensor, shown: dict[str, Tensor], counted: Tensor, config: DistillConfig) -> Loss:
    """Of divergence, cross-entropy and what is logged beside them, [B, S] each."""
    weight = config.distill_ce_weight
    total = torch.where(counted, (1.0 - weight) * values + weight * nll, 0.0).sum()
    tokens = counted.sum()
    sums = {"loss": total, "nll": nll.sum()}
    sums |= {name: torch.where(counted, each, 0.0).sum() for name, each in shown.items()}
    return total, tokens.to(torch.int), {name: logged_pair(each, tokens) for name, each in sums.items()}
