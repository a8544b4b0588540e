"""Cross-entropy of a vocabulary divided over tp ranks, fused with the output matrix and cut along the tokens.

Full fp32 logits never exist: at most ``CHUNK_TOKENS`` rows (and never more than half of all) are formed at a time, and
their gradients are taken at once, so nothing of size tokens x vocabulary is saved for the backward pass. The idea of
taking the gradient inside the forward pass is Liger Kernel's (arXiv 2410.10989), the vocabulary-parallel reduction is
Megatron-LM's (arXiv 1909.08053, section 3).

Shapes: T tokens, H hidden, V padded vocabulary, V_l = V / tp rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024


def vocab_parallel_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *, group: Any, vocab_size: int
) -> Tensor:
    """Masked sum of the tokens' cross-entropies, in nats.

    Args:
        hidden: [T, H], equal on all tp ranks; its gradient is this rank's *part* and must be summed over tp
            (core's ``copy_to_tensor_model_parallel_region`` or its sequence-parallel gather does so).
        weight: [V_l, H], this rank's rows of the output matrix.
        labels: [T] global token ids.
        loss_mask: [T] weights; a token with weight 0 contributes neither loss nor gradient.
        group: tp group.
        vocab_size: real tokens; the padding rows behind them never enter the sum.

    Returns:
        Scalar in fp32 (float64 for float64 input), equal on all tp ranks.
    """
    result: Tensor = _VocabParallelLoss.apply(hidden, weight, labels, loss_mask, group, vocab_size)
    return result


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  the signature is autograd's
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, group: Any, vocab_size: int
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        first_row = group.rank() * weight.shape[0]
        padding = max(0, first_row + weight.shape[0] - vocab_size)
        mask = loss_mask.to(exact)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # Chunks are added in full precision; a half-precision sum would lose the last chunks' bits.
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_grad else None
        size = min(CHUNK_TOKENS, -(-hidden.shape[0] // 2))
        for rows in torch.arange(hidden.shape[0]).split(max(1, size)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = (hidden[part] @ weight.t()).to(exact)
            if padding:
                logits[:, weight.shape[0] - padding :] = float("-inf")
            losses, softmax = _cross_entropy(logits, labels[part] - first_row, group, needs_grad=needs_grad)
            total += (losses * mask[part]).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = softmax.mul_(mask[part, None]).to(hidden.dtype)
                torch.matmul(grad_logits, weight, out=grad_hidden[part])
                grad_weight += (grad_logits.t() @ hidden[part]).to(exact)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


def _cross_entropy(logits: Tensor, targets: Tensor, group: Any, *, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses [T] and, in place of ``logits`` [T, V_l], their gradient softmax - one_hot. Two collectives."""
    maximum = logits.max(dim=-1).values
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logits -= maximum[:, None]
    mine = (targets >= 0) & (targets < logits.shape[1])
    column = torch.where(mine, targets, torch.zeros_like(targets))[:, None]
    target_logit = torch.where(mine, logits.gather(1, column)[:, 0], torch.zeros_like(maximum))
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(dim=-1), target_logit])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    losses = sums[0].log() - sums[1]
    if needs_grad:
        exponentials /= sums[0][:, None]
        exponentials.scatter_add_(1, column, -mine[:, None].to(exponentials.dtype))
    return losses, exponentials
