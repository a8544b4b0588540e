"""Group-relative policy optimization (DeepSeekMath, arXiv 2402.03300, equation 3) and its relatives.

Of a sampled token, r is the ratio of its probabilities now and when it was sampled, A its sequence's advantage
(``advantages.group_advantages``), w the correction below, and l = -w min(r A, clip(r, 1 - e_low, 1 + e_high) A)
+ beta KL - c H, with the entropy H. Over sequences i of n_i labels, N of them with T labels in the whole global batch,

    dapo     1/T sum over all labels of l                                  arXiv 2503.14476, equation 8
    grpo     1/N sum over i of (1/n_i) sum of l                            arXiv 2402.03300, equation 3
    dr_grpo  1/N sum over i of (1/L) sum of l, L constant                  arXiv 2503.20783
    gspo     grpo with r = s_i = exp(1/n_i sum of log r), one a sequence   arXiv 2507.18071, equations 5 and 7
    cispo    dapo with -w sg[clip(r)] A log p in the place of the minimum  arXiv 2506.13585, equations 4 and 5

sg stops the gradient. The distance from the reference is k3 (or k1) of ``surrogate.kl_estimate``, multiplied by the
ratio where ``kl_bias_correction`` (DeepSeek-V3.2, arXiv 2512.02556): only so its gradient is that of KL(p, p_ref).

What generation and training say of the same sample differs where their kernels do. With v = p_old / p_generation of a
token, or the product over its sequence, w = min(v, cap) (truncate) or v where v <= cap, else 0 (mask).

Shapes: B micro-batch, S sequence of this cp rank, N sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import ENTROPY, LOGPROB
from megatron_slm.stages.config import GrpoConfig
from megatron_slm.stages.segments import Logs, Loss, Segments, logged_pair, segments_of
from megatron_slm.stages.surrogate import Clip, clipped, clipped_shares, kl_estimate, log_ratio


class Terms(NamedTuple):
    """What a loss is made of, [B, S] each, 0 where the label does not count.

    Attributes:
        logprobs, entropy: of the policy now.
        log_ratio: to the policy that sampled.
        advantages: of the label's sequence.
        kl: distance from the reference, without the ratio.
        gap: log-probability in training less that in generation.
        correction: w.
    """

    logprobs: Tensor
    entropy: Tensor
    log_ratio: Tensor
    advantages: Tensor
    kl: Tensor
    gap: Tensor
    correction: Tensor


def loss(output: Tensor, batch: Batch, *, config: GrpoConfig, cp: Any = None) -> Loss:
    """(sum of the loss, labels or sequences, what to log). Collective over ``cp``.

    Args:
        output: [3, B, S] of ``TokenScores``, at the temperature and within the kept set of the rollout.
        batch: ``loss_mask``, ``segments``, ``advantages`` [B, S]; ``old_logprobs``, without which the policy is the one
            that sampled; ``ref_logprobs`` with ``grpo_kl_beta``; ``generation_logprobs`` with ``grpo_is_correction``.
        cp: the context-parallel group.

    Raises:
        ConfigError: dr_grpo does not know its length.
    """
    segments = segments_of(batch, cp)
    terms = _terms(output, batch, segments, config)
    if config.grpo_loss == "gspo":
        ratio, kl, losses = _by_sequence(terms, segments, config)
        total = losses.sum()
        shown = segments.once(total)
    else:
        ratio = terms.log_ratio.exp()
        kl = terms.kl * ratio if config.kl_bias_correction else terms.kl
        losses = terms.correction * _policy_loss(terms, ratio, config) + config.grpo_kl_beta * kl
        losses = losses - config.grpo_entropy_coef * terms.entropy
        total = shown = (segments.masked(losses) / _divisors(segments, config, losses)).sum()
    by_token = config.grpo_loss in ("dapo", "cispo")
    count = segments.token_count() if by_token else segments.sequence_count()
    logs = {"loss": logged_pair(shown, count)} | _logs(terms, ratio, kl, segments, config)
    return total, count, {name: logs[name] for name in logged(config)}


def logged(config: GrpoConfig) -> tuple[str, ...]:
    """What ``loss`` logs: TRL's names, and the mean ratio."""
    clips = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    if config.grpo_loss == "cispo":
        clips = ["cispo_clip_ratio"]
    correction = ["sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"]
    return (
        "loss",
        *(["kl"] if config.grpo_kl_beta else []),
        "entropy",
        "policy/ratio",
        *clips,
        *(correction if config.grpo_is_correction != "none" else []),
    )


def _terms(output: Tensor, batch: Batch, segments: Segments, config: GrpoConfig) -> Terms:
    def field(name: str) -> Tensor:
        return segments.masked(batch[name].to(output.dtype))

    logprobs = segments.masked(output[LOGPROB])
    old = field("old_logprobs") if "old_logprobs" in batch else logprobs.detach()
    kl, correction, gap = torch.zeros_like(logprobs), torch.ones_like(logprobs), torch.zeros_like(logprobs)
    if config.grpo_kl_beta:
        kl = kl_estimate(logprobs, field("ref_logprobs"), config.grpo_kl_estimator, bounded=config.bounded_kl)
    if config.grpo_is_correction != "none":
        gap = old - field("generation_logprobs")
        correction = _correction(gap, segments, config)
    return Terms(
        logprobs=logprobs,
        entropy=segments.masked(output[ENTROPY]),
        log_ratio=log_ratio(logprobs, old, config.log_ratio_limit),
        advantages=field("advantages"),
        kl=kl,
        gap=gap,
        correction=correction,
    )


def _correction(gap: Tensor, segments: Segments, config: GrpoConfig) -> Tensor:
    """w [B, S] of the log-probabilities' differences [B, S]; no gradient passes."""
    level, _, beyond = config.grpo_is_correction.partition("_")
    if level == "sequence":
        gap = segments.spread(segments.sums(gap))
    weights = gap.detach().exp()
    if beyond == "truncate":
        return weights.clamp(max=config.grpo_is_cap)
    return torch.where(weights > config.grpo_is_cap, 0.0, weights)


def _clip(config: GrpoConfig) -> Clip:
    return Clip(config.ratio_lower, config.ratio_upper, config.dual_clip)


def _policy_loss(terms: Terms, ratio: Tensor, config: GrpoConfig) -> Tensor:
    """[B, S]: the surrogate of each label."""
    if config.grpo_loss == "cispo":
        weights = ratio.detach().clamp(config.ratio_lower, config.ratio_upper)
        return -weights * terms.advantages * terms.logprobs
    return clipped(ratio, terms.advantages, _clip(config))


def _by_sequence(terms: Terms, segments: Segments, config: GrpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """GSPO: ratios and distances at the labels [B, S], to be logged, and the loss of each sequence [N].

    Everything is averaged over a sequence before it is multiplied: only whole sequences have a gradient that no cp rank
    has to hand on to another.
    """
    log_ratios = segments.means(terms.log_ratio)
    if config.grpo_convention == "verl":
        log_ratios = log_ratios.clamp(max=10.0)
    ratios = log_ratios.exp()
    advantages, kl = segments.means(terms.advantages), segments.means(terms.kl)
    kl = kl * ratios if config.kl_bias_correction else kl
    losses = segments.means(terms.correction) * clipped(ratios, advantages, _clip(config)) + config.grpo_kl_beta * kl
    losses = losses - config.grpo_entropy_coef * segments.means(terms.entropy)
    ratio = segments.spread(ratios.detach())
    shown = terms.kl.detach() * ratio if config.kl_bias_correction else terms.kl.detach()
    return ratio, shown, torch.where(segments.present, losses, 0.0)


def _divisors(segments: Segments, config: GrpoConfig, like: Tensor) -> Tensor:
    """What the loss of a label is divided by, beside the denominator of the whole batch: [B, S] or []."""
    if config.grpo_loss == "grpo":
        return segments.spread(segments.divisors(like)).clamp(min=1.0)
    if config.grpo_loss != "dr_grpo":
        return like.new_ones(())
    if config.grpo_completion_length is None:
        raise ConfigError(
            "grpo.grpo_loss = dr_grpo divides by a constant number of tokens, and grpo.grpo_completion_length is not "
            "set; give it the most tokens that a rollout may draw."
        )
    return like.new_tensor(float(config.grpo_completion_length))


def _logs(terms: Terms, ratio: Tensor, kl: Tensor, segments: Segments, config: GrpoConfig) -> Logs:
    ratio = ratio.detach()
    low, high = clipped_shares(ratio, terms.advantages, _clip(config))
    found = {
        "kl": kl,
        "entropy": terms.entropy,
        "policy/ratio": ratio,
        "clip_ratio/low_mean": low.double(),
        "clip_ratio/high_mean": high.double(),
        "clip_ratio/region_mean": (low | high).double(),
        "cispo_clip_ratio": high.double(),
        "sampling/sampling_logp_difference/mean": terms.gap.abs(),
        "sampling/importance_sampling_ratio/mean": terms.correction,
    }
    count = segments.token_count()
    return {name: logged_pair(segments.total(values), count) for name, values in found.items()}
