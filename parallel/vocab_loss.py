"""The loss of a vocabulary divided over tp ranks, fused with the output matrix and cut along the tokens.

Full fp32 logits never exist: at most ``CHUNK_TOKENS`` rows (and never more than half of all) are formed at a time, and
their gradients are taken at once, so nothing of size tokens x vocabulary is saved for the backward pass. The idea of
taking the gradient inside the forward pass is Liger Kernel's (arXiv 2410.10989), the vocabulary-parallel reduction is
Megatron-LM's (arXiv 1909.08053, section 3).

Of a token with logits l over the real vocabulary, label t, Z = sum of exp(l) and p = exp(l) / Z the objective is

    (1 - e) (-log p_t) + e mean(-log p) + z (log Z)^2

with the label smoothing e of Szegedy et al. (arXiv 1512.00567, section 7) and the z-loss z of PaLM (arXiv 2204.02311,
section 5).

Shapes: T tokens, H hidden, V padded vocabulary, V_l = V / tp rows of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024
OBJECTIVE, CROSS_ENTROPY, SQUARED_LOG_PARTITION = 0, 1, 2
"""Where ``vocab_parallel_loss`` puts its sums."""


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
        vocab_size: real tokens; the padding rows behind them never enter a sum.
        z_loss_coefficient: of (log Z)^2.
        label_smoothing: probability spread evenly over the real tokens, in [0, 1).
    """

    vocab_size: int
    z_loss_coefficient: float = 0.0
    label_smoothing: float = 0.0


def vocab_parallel_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *, group: Any, objective: Objective
) -> Tensor:
    """Masked sums over the tokens: of the objective, of the cross-entropy in nats, and of the squared log-partition.

    Args:
        hidden: [T, H], equal on all tp ranks; its gradient is this rank's *part* and must be summed over tp
            (core's ``copy_to_tensor_model_parallel_region`` or its sequence-parallel gather does so).
        weight: [V_l, H], this rank's rows of the output matrix.
        labels: [T] global token ids.
        loss_mask: [T] weights; a token with weight 0 contributes neither loss nor gradient.
        group: tp group.
        objective: what is minimised.

    Returns:
        [3] in fp32 (float64 for float64 input), equal on all tp ranks: ``OBJECTIVE``, ``CROSS_ENTROPY`` and
        ``SQUARED_LOG_PARTITION``. The objective alone has a gradient; the others are there to be logged.
    """
    result: Tensor = _VocabParallelLoss.apply(hidden, weight, labels, loss_mask, group, objective)
    return result


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  the signature is autograd's
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, group: Any, objective: Objective
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        first_row = group.rank() * weight.shape[0]
        real = min(max(objective.vocab_size - first_row, 0), weight.shape[0])
        mask = loss_mask.to(exact)
        totals = torch.zeros(3, dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # Chunks are added in full precision; a half-precision sum would lose the last chunks' bits.
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        tokens = hidden.shape[0]
        size = max(1, min(CHUNK_TOKENS, -(-tokens // 2)))
        for part in (slice(start, min(start + size, tokens)) for start in range(0, tokens, size)):
            logits = (hidden[part] @ weight.t()).to(exact)
            logits[:, real:] = float("-inf")
            losses, gradient = _losses(
                logits, labels[part] - first_row, group, objective, real=real, needs_grad=needs_grad
            )
            totals += torch.stack([(each * mask[part]).sum() for each in losses])
            if grad_hidden is not None:
                grad_logits = gradient.mul_(mask[part, None]).to(hidden.dtype)
                torch.matmul(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += (grad_logits.t() @ hidden[part]).to(exact)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return totals

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output[OBJECTIVE].to(grad_hidden.dtype)
        of_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden * scale, of_weight, None, None, None, None


def _losses(
    logits: Tensor, targets: Tensor, group: Any, objective: Objective, *, real: int, needs_grad: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """What ``vocab_parallel_loss`` sums, each [T], and, in place of ``logits`` [T, V_l], the objective's gradient.

    Two collectives, whatever the objective. Columns from ``real`` on are padding.
    """
    _, z_loss, smoothing = objective
    maximum = logits.max(dim=-1).values
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logits -= maximum[:, None]
    mine = (targets >= 0) & (targets < logits.shape[1])
    column = torch.where(mine, targets, torch.zeros_like(targets))[:, None]
    target_logit = torch.where(mine, logits.gather(1, column)[:, 0], torch.zeros_like(maximum))
    # Only where it is needed: a longer exchange may be added up in another order.
    logit_sum = [logits[:, :real].sum(dim=-1)] if smoothing else []
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(dim=-1), target_logit, *logit_sum])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    log_sum = sums[0].log()
    log_partition = maximum + log_sum
    minimised = cross_entropy = log_sum - sums[1]
    if smoothing:
        minimised = minimised + smoothing * (sums[1] - sums[2] / objective.vocab_size)
    if z_loss:
        minimised = minimised + z_loss * log_partition.square()
    if needs_grad:  # p (1 + 2 z log Z) - (1 - e) one_hot - e / vocabulary; padding columns stay 0
        exponentials /= sums[0][:, None]
        if z_loss:
            exponentials *= (1.0 + 2.0 * z_loss * log_partition)[:, None]
        if smoothing:
            exponentials[:, :real] -= smoothing / objective.vocab_size
        exponentials.scatter_add_(1, column, (smoothing - 1.0) * mine[:, None].to(exponentials.dtype))
    return (minimised, cross_entropy, log_partition.square()), exponentials
