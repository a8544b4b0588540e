"""Supervised fine-tuning: the likelihood of the labels that count.

Over the T trained labels y_t of the whole global batch, with weights w_t (1 unless the data says otherwise)

    nll    1/T sum of w_t (-log p(y_t))
    dft    1/T sum of w_t sg[p(y_t)] (-log p(y_t))          dynamic fine-tuning, arXiv 2508.05629

sg stops the gradient. T counts labels, not weights: a label of weight 0.5 adds half of its loss and one to T.

Shapes: B micro-batch, S sequence of this cp rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import CORRECT, ENTROPY, LOGPROB
from megatron_slm.stages.config import SftConfig
from megatron_slm.stages.segments import Loss, logged_pair


def loss(output: Tensor, batch: Batch, *, config: SftConfig, cp: Any = None) -> Loss:
    """(sum of the loss, trained labels, what to log).

    Args:
        output: [3, B, S] of ``TokenScores``.
        batch: ``loss_mask`` [B, S], the weights.
        cp: not needed: every label is counted where it lies.
    """
    weights = batch["loss_mask"]
    counted = weights != 0
    logprobs = torch.where(counted, output[LOGPROB], 0.0)
    nll = -logprobs * weights
    losses = nll * logprobs.detach().exp() if config.sft_loss == "dft" else nll
    tokens = counted.sum()
    total = losses.sum()
    logs = {
        "loss": logged_pair(total, tokens),
        "nll": logged_pair(nll.sum(), tokens),
        "entropy": logged_pair(torch.where(counted, output[ENTROPY], 0.0).sum(), tokens),
        "mean_token_accuracy": logged_pair(torch.where(counted, output[CORRECT], 0.0).sum(), tokens),
    }
    return total, tokens.to(torch.int), {name: logs[name] for name in logged(config)}


def logged(config: SftConfig) -> tuple[str, ...]:
    """What ``loss`` logs: TRL's names, and the likelihood itself where it is not the loss."""
    return ("loss", *(("nll",) if config.sft_loss != "nll" else ()), "entropy", "mean_token_accuracy")
