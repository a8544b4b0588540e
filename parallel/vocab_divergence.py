"""How far a student's next-token distribution is from a teacher's, over a vocabulary divided over tp ranks.

With p of the teacher, q of the student, both at one temperature, and m = beta p + (1 - beta) q, per token

    beta = 0     forward KL       sum p (log p - log q)
    beta = 1     reverse KL       sum q (log q - log p)
    between      generalised JSD  beta KL(p | m) + (1 - beta) KL(q | m)       (arXiv 2306.13649, equation 1)

Two collectives a chunk (the maxima; one sum of everything), a third for the JSD, whose m needs both normalisers first.
Neither model's logits exist for more than ``CHUNK_TOKENS`` rows. The teacher has no gradient; with respect to the
student's logits z

    d forward / dz = q - p      d reverse / dz = q (log q - log p - reverse)
    d JSD / dz = (1 - beta) q (log q - log m - KL(q | m))

Shapes: T tokens, H hidden of the student, G of the teacher, V padded vocabulary, V_l = V / tp rows of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel.vocab_scores import Shard, Vocabulary, chunks

DIVERGENCE, LOGPROB, FORWARD, REVERSE, ENTROPY, AGREEMENT = range(6)
"""Where ``vocab_parallel_divergence`` puts its values; the first two have a gradient."""


class Teacher(NamedTuple):
    """What a teacher says: its last hidden states [T, G], and this rank's rows [V_l, G] of its output matrix."""

    hidden: Tensor
    weight: Tensor


def vocab_parallel_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    teacher: Teacher,
    beta: float,
    group: Any,
    vocabulary: Vocabulary,
) -> Tensor:
    """Divergence and cross-entropy of every token, and what is logged beside them.

    Args:
        hidden: [T, H] of the student, equal on all tp ranks; its gradient is this rank's *part*.
        weight: [V_l, H], this rank's rows of the student's output matrix.
        labels: [T] global token ids.
        counts: [T]; where it is 0 every value is 0, and nothing of the token is read.
        teacher: of the same vocabulary, its hidden states equal on all tp ranks.
        beta: in [0, 1].
        group: tp group.
        vocabulary: its size, and the temperature of both.

    Returns:
        [6, T] in fp32 (float64 for float64 input), equal on all tp ranks: the divergence and the log-probability of the
        label at the temperature, in nats; without gradient forward and reverse KL, the student's entropy, and 1 where
        both hold the same token for the likeliest.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = counts != 0
    values = torch.zeros(6, len(counts), dtype=exact, device=hidden.device)
    if not bool(counted.any()):
        return values + torch.where(counted, hidden.sum(dim=-1).to(exact), 0.0) + weight[:0].sum().to(exact)
    chosen = Teacher(teacher.hidden[counted].detach(), teacher.weight.detach())
    asked = _Asked(beta, group, vocabulary)
    found: Tensor = _Divergence.apply(hidden[counted], weight, labels[counted], chosen, asked)
    return values.masked_scatter(counted, found)


class _Asked(NamedTuple):
    beta: float
    group: Any
    vocabulary: Vocabulary


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, asked: _Asked) -> Tensor:
        """hidden [T, H], weight [V_l, H], labels [T] -> values [6, T]."""
        beta, group, vocabulary = asked
        shard = Shard.of(weight, group, vocabulary)
        results, kept = [], []
        for part in chunks(len(hidden)):
            student_logits = shard.logits(hidden[part], weight)
            teacher_logits = shard.logits(teacher.hidden[part], teacher.weight)
            maxima = torch.stack([student_logits.max(dim=-1).values, teacher_logits.max(dim=-1).values])
            if group.size() > 1:
                dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            student_logits -= maxima[0, :, None]
            teacher_logits -= maxima[1, :, None]
            sums = _sums(student_logits, teacher_logits, labels[part], shard)
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            values, partitions = _values(sums)
            if 0.0 < beta < 1.0:
                log_q = student_logits - partitions[0, :, None]
                log_p = teacher_logits - partitions[1, :, None]
                from_mixture = _from_mixture(log_q, log_p, beta)
                if group.size() > 1:
                    dist.all_reduce(from_mixture, group=group)
                of_teacher, of_student = from_mixture
                values[DIVERGENCE] = beta * of_teacher + (1.0 - beta) * of_student
            else:
                of_student = values[REVERSE]
                values[DIVERGENCE] = values[FORWARD] if beta == 0.0 else values[REVERSE]
            results.append(values)
            kept.append(torch.stack([*(partitions + maxima), of_student]))
        ctx.save_for_backward(hidden, weight, labels, *teacher, torch.cat(kept, dim=1))
        ctx.shard, ctx.beta = shard, beta
        return torch.cat(results, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """gradient [6, T], of which the first two count -> this rank's part of those of hidden and weight."""
        hidden, weight, labels, teacher_hidden, teacher_weight, kept = ctx.saved_tensors
        shard: Shard = ctx.shard
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=gradient.dtype) if ctx.needs_input_grad[1] else None
        for part in chunks(len(hidden)):
            log_q = shard.logits(hidden[part], weight) - kept[0, part, None]
            log_p = shard.logits(teacher_hidden[part], teacher_weight) - kept[1, part, None]
            q = log_q.exp()
            grad_logits = _slope(log_q, log_p, q, kept[2, part, None], ctx.beta) * gradient[DIVERGENCE, part, None]
            of_label = gradient[LOGPROB, part, None]
            columns, mine = shard.columns(labels[part, None])
            grad_logits -= q * of_label
            grad_logits.scatter_add_(1, columns, torch.where(mine, of_label, 0.0))
            shard.spread(grad_logits, hidden, weight, part=part, grad_hidden=grad_hidden, grad_weight=grad_weight)
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, of_weight, None, None, None


def _sums(student: Tensor, teacher: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """This rank's part of what both KLs, the entropy, the label and the agreement need: [8, T] of shifted logits."""
    q, p = student.exp(), teacher.exp()
    columns, mine = shard.columns(labels[:, None])
    label = torch.where(mine, student.gather(1, columns), 0.0)[:, 0]
    # Padding has probability 0 and logit -inf: what the product would be is no number.
    products = [torch.where(one > 0, one * other, 0.0) for one in (q, p) for other in (student, teacher)]
    agree = ((student == 0.0) & (teacher == 0.0)).to(student.dtype)
    return torch.stack([each.sum(dim=-1) for each in (q, p, *products, agree)] + [label])


def _values(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Values [6, T], the divergence still open, and log normalisers [2, T] of student and teacher."""
    q, p, q_student, q_teacher, p_student, p_teacher, agree, label = sums
    log_q, log_p = q.log(), p.log()
    forward = (p_teacher - p_student) / p + log_q - log_p
    reverse = (q_student - q_teacher) / q + log_p - log_q
    values = torch.stack(
        [torch.zeros_like(q), label - log_q, forward, reverse, log_q - q_student / q, (agree > 0).to(q.dtype)]
    )
    return values, torch.stack([log_q, log_p])


def _log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    weights = torch.tensor([1.0 - beta, beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_q + weights[0], log_p + weights[1])


def _from_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """This rank's part of KL(p | m) and KL(q | m): [2, T]."""
    log_m = _log_mixture(log_q, log_p, beta)
    return torch.stack(
        [torch.where(log_m > float("-inf"), one.exp() * (one - log_m), 0.0).sum(dim=-1) for one in (log_p, log_q)]
    )


def _slope(log_q: Tensor, log_p: Tensor, q: Tensor, of_student: Tensor, beta: float) -> Tensor:
    """Gradient [T, V_l] of the divergence with respect to the student's logits."""
    if beta == 0.0:
        return q - log_p.exp()
    other = log_p if beta == 1.0 else _log_mixture(log_q, log_p, beta)
    scale = 1.0 if beta == 1.0 else 1.0 - beta
    return scale * q * torch.where(q > 0, log_q - other - of_student, 0.0)
