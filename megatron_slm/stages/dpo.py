"""Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7) and its relatives.

Of a pair, h_w and h_l are the sums over the labels of the chosen and the rejected side of log p - log p_ref, n_w and
n_l the numbers of those labels, s = sigmoid, e the label smoothing and b beta. Over the P pairs of the whole global
batch, 1/P times the sum of

    sigmoid       -(1 - e) log s(b (h_w - h_l)) - e log s(-b (h_w - h_l))     cDPO, ericmitchell.ai/cdpo.pdf
    sigmoid_norm  the same of h_w / n_w - h_l / n_l                           by length, Tuelu 3, arXiv 2411.15124
    ipo           (h_w / n_w - h_l / n_l - 1 / (2 b))^2                       arXiv 2310.12036, equation 17
    robust        (-(1 - e) log s(b (h_w - h_l)) + e log s(-b (h_w - h_l))) / (1 - 2 e)     arXiv 2403.00409
    apo_zero      1 - s(b h_w) + s(b h_l)                                     arXiv 2408.06266, equation 7

and, with ``dpo_sft_weight``, that weight times the mean of -log p over all labels of the chosen sides (as in
arXiv 2404.19733, without its normalisation by sequence). That mean has its own denominator, so its weight comes with
the batch, see ``sft_token_weight``.

Shapes: B micro-batch, S sequence of this cp rank, P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import CORRECT, ENTROPY, LOGPROB
from megatron_slm.stages.config import DpoConfig
from megatron_slm.stages.segments import Logs, Loss, Segments, logged_pair, pairs, segments_of


def loss(output: Tensor, batch: Batch, *, config: DpoConfig, cp: Any = None) -> Loss:
    """(sum of the loss, pairs, what to log). Collective over ``cp``.

    Args:
        output: [3, B, S] of ``TokenScores``.
        batch: ``loss_mask``, ``segments``, ``ref_logprobs`` [B, S], and with ``dpo_sft_weight`` ``sft_weights``: the
            weight of ``sft_token_weight`` at every label of the chosen sides, 0 elsewhere.
        cp: the context-parallel group.
    """
    segments = segments_of(batch, cp)
    logprobs = segments.masked(output[LOGPROB])
    ratios = logprobs - segments.masked(batch["ref_logprobs"].to(logprobs.dtype))
    chosen, rejected = pairs(segments.sums(ratios))
    if config.dpo_loss in ("sigmoid_norm", "ipo"):
        losses = _of_pairs(*pairs(segments.means(ratios)), config)
    else:
        losses = _of_pairs(chosen, rejected, config)
    present = pairs(segments.present)[0]
    of_pairs = torch.where(present, losses, 0.0).sum()
    count = segments.once(present.sum())
    total, logged_loss = of_pairs, segments.once(of_pairs.detach())
    logs: Logs = {}
    if config.dpo_sft_weight:
        weights = segments.masked(batch["sft_weights"].to(logprobs.dtype))
        sft = -(logprobs * weights).sum()
        total, logged_loss = of_pairs + sft, logged_loss + sft.detach()
        tokens = (weights != 0).sum()
        logs["sft_loss"] = logged_pair(torch.where(weights != 0, -logprobs, 0.0).sum(), tokens)
    logs = {"loss": logged_pair(logged_loss, count)} | logs
    logs |= _of_pair_rewards(chosen, rejected, segments, count, beta=config.dpo_beta)
    logs |= _of_scores(output, logprobs, segments, count)
    return total, count.to(torch.int), {name: logs[name] for name in logged(config)}


def logged(config: DpoConfig) -> tuple[str, ...]:
    """What ``loss`` logs: TRL's names; ``logps/chosen_delta`` is the chosen side's log-ratio to the reference."""
    return (
        "loss",
        *(("sft_loss",) if config.dpo_sft_weight else ()),
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_delta",
        "entropy",
        "mean_token_accuracy",
    )


def sft_token_weight(weight: float, pairs: int, chosen_labels: int) -> float:
    """What ``sft_weights`` holds at each label of a chosen side.

    The sum of the loss is divided by the pairs of the global batch, the mean of the likelihood by its labels.

    Args:
        weight: ``dpo_sft_weight``.
        pairs: of the whole global batch.
        chosen_labels: labels that count on their chosen sides.
    """
    return weight * pairs / max(chosen_labels, 1)


def _of_pairs(chosen: Tensor, rejected: Tensor, config: DpoConfig) -> Tensor:
    """[P]: the loss of each pair, of its summed (or averaged) log-ratios [P]."""
    beta, smoothing = config.dpo_beta, config.dpo_label_smoothing
    difference = chosen - rejected
    if config.dpo_loss == "ipo":
        return (difference - 1.0 / (2.0 * beta)).square()
    if config.dpo_loss == "apo_zero":
        return 1.0 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    kept, flipped = -logsigmoid(beta * difference), -logsigmoid(-beta * difference)
    if config.dpo_loss == "robust":
        return ((1.0 - smoothing) * kept - smoothing * flipped) / (1.0 - 2.0 * smoothing)
    return (1.0 - smoothing) * kept + smoothing * flipped


def _of_pair_rewards(chosen: Tensor, rejected: Tensor, segments: Segments, count: Tensor, *, beta: float) -> Logs:
    """Of the log-ratios [P] of both sides; ``beta`` times a log-ratio is the reward that DPO implies."""
    found = {
        "rewards/chosen": beta * chosen.sum(),
        "rewards/rejected": beta * rejected.sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "rewards/margins": beta * (chosen - rejected).sum(),
        "logps/chosen_delta": chosen.sum(),
    }
    return {name: logged_pair(segments.once(value), count) for name, value in found.items()}


def _of_scores(output: Tensor, logprobs: Tensor, segments: Segments, count: Tensor) -> Logs:
    """Likelihoods of the sides by pair, entropy over all labels, accuracy over the chosen ones."""
    of_chosen = segments.counted & (segments.number % 2 == 0)
    correct = torch.where(of_chosen, output[CORRECT], 0.0).sum()
    likelihoods = [torch.where(side, logprobs, 0.0).sum() for side in (of_chosen, ~of_chosen)]
    return {
        "logps/chosen": logged_pair(likelihoods[0], count),
        "logps/rejected": logged_pair(likelihoods[1], count),
        "entropy": logged_pair(segments.total(output[ENTROPY]), segments.token_count()),
        "mean_token_accuracy": logged_pair(correct, of_chosen.sum()),
    }
