"""Log-probabilities and exact entropy of a vocabulary divided over tp ranks, fused with the output matrix.

Of a token with logits l over the real vocabulary (divided by the temperature), labels t and Z = sum of exp(l):

    log p_t = l_t - log Z          H = log Z - sum of exp(l) l / Z

Two collectives a chunk, whatever is asked for: the maximum, and one sum of everything else. Logits exist for
``CHUNK_TOKENS`` rows at a time; the backward pass forms them again, without a collective, from the log Z that was kept:

    d log p_t / d l = one_hot(t) - p          d H / d l = -p (log p + H)

Tokens that do not count are left out of every product. Shapes: T tokens, H hidden, V padded vocabulary, V_l = V / tp
rows of this rank, K labels a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel.vocab_loss import CHUNK_TOKENS

LOGPROB, ENTROPY, CORRECT = 0, 1, 2
"""Where ``vocab_parallel_scores`` puts the scores of a token with one label."""


class Vocabulary(NamedTuple):
    """How logits become probabilities.

    Attributes:
        vocab_size: real tokens; the padding rows behind them have no probability.
        temperature: divides the logits.
    """

    vocab_size: int
    temperature: float = 1.0


def vocab_parallel_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    group: Any,
    vocabulary: Vocabulary,
    kept: Tensor | None = None,
) -> Tensor:
    """Log-probability of every label, entropy, and whether the first label is the likeliest token.

    Args:
        hidden: [T, H], equal on all tp ranks; its gradient is this rank's *part* and must be summed over tp.
        weight: [V_l, H], this rank's rows of the output matrix.
        labels: [T] or [T, K] global token ids.
        counts: [T]; where it is 0 every score is 0, and nothing of the token is read.
        group: tp group.
        vocabulary: its size and temperature.
        kept: [T, N] ids among which the token was drawn, filled up with -1; all others have no probability. A row of -1
            alone keeps the whole vocabulary.

    Returns:
        [K + 2, T] in fp32 (float64 for float64 input), equal on all tp ranks: the log-probabilities in nats, the
        entropy in nats, and 1 where the first label is a likeliest token. The last has no gradient.
    """
    width = 1 if labels.dim() == 1 else labels.shape[1]
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = counts != 0
    scores = torch.zeros(width + 2, len(counts), dtype=exact, device=hidden.device)
    if not bool(counted.any()):
        # Zero whatever the hidden states hold, and still a part of the graph: each rank has its gradients to reduce.
        return scores + torch.where(counted, hidden.sum(dim=-1).to(exact), 0.0) + weight[:0].sum().to(exact)
    found: Tensor = _Scores.apply(
        hidden[counted],
        weight,
        labels[counted].view(-1, width),
        None if kept is None else kept[counted],
        group,
        vocabulary,
    )
    return scores.masked_scatter(counted, found)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  the signature is autograd's
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        group: Any,
        vocabulary: Vocabulary,
    ) -> Tensor:
        """hidden [T, H], weight [V_l, H], labels [T, K], kept [T, N] -> scores [K + 2, T]."""
        shard = Shard.of(weight, group, vocabulary)
        results, partitions = [], []
        for part in chunks(len(hidden)):
            logits = shard.logits(hidden[part], weight, None if kept is None else kept[part])
            maximum = _largest(logits, group)
            logits -= maximum[:, None]
            columns, mine = shard.columns(labels[part])
            own = torch.where(mine, logits.gather(1, columns), 0.0)
            exponentials = logits.exp()
            # exp(-inf) x -inf is no number; what has no probability adds nothing to the entropy.
            weighted = torch.where(exponentials > 0, exponentials * logits, 0.0)
            sums = torch.cat([exponentials.sum(-1)[None], weighted.sum(-1)[None], own.t()])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            log_sum, labelled = sums[0].log(), sums[2:]
            likeliest = (labelled[:1] == 0.0).to(logits.dtype)
            results.append(torch.cat([labelled - log_sum, (log_sum - sums[1] / sums[0])[None], likeliest]))
            partitions.append(maximum + log_sum)
        scores = torch.cat(results, dim=1)
        ctx.save_for_backward(hidden, weight, labels, kept, torch.cat(partitions), scores[-2])
        ctx.shard = shard
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """gradient [K + 2, T] -> this rank's part of those of hidden and weight."""
        hidden, weight, labels, kept, partition, entropy = ctx.saved_tensors
        shard: Shard = ctx.shard
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=gradient.dtype) if ctx.needs_input_grad[1] else None
        for part in chunks(len(hidden)):
            logits = shard.logits(hidden[part], weight, None if kept is None else kept[part])
            logits -= partition[part, None]
            probabilities = logits.exp()
            of_labels, of_entropy = gradient[:-2, part].t(), gradient[-2, part, None]
            surprise = torch.where(probabilities > 0, logits + entropy[part, None], 0.0)
            grad_logits = probabilities * (-of_labels.sum(-1, keepdim=True) - of_entropy * surprise)
            columns, mine = shard.columns(labels[part])
            grad_logits.scatter_add_(1, columns, torch.where(mine, of_labels, 0.0))
            shard.spread(grad_logits, hidden, weight, part=part, grad_hidden=grad_hidden, grad_weight=grad_weight)
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, of_weight, None, None, None, None


class Shard(NamedTuple):
    """This rank's rows of the output matrix.

    Attributes:
        first: global id of its first row.
        real: rows that stand for tokens; those behind them are padding.
        temperature: divides the logits.
    """

    first: int
    real: int
    temperature: float

    @staticmethod
    def of(weight: Tensor, group: Any, vocabulary: Vocabulary) -> Shard:
        """The shard of ``weight`` [V_l, H] on a rank of ``group``."""
        rows = weight.shape[0]
        first = group.rank() * rows
        return Shard(first, min(max(vocabulary.vocab_size - first, 0), rows), vocabulary.temperature)

    def logits(self, hidden: Tensor, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        """[T, V_l] in full precision, minus infinity where there is no probability."""
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = (hidden @ weight.t()).to(exact)
        if self.temperature != 1.0:
            logits /= self.temperature
        logits[:, self.real :] = float("-inf")
        if kept is not None:
            logits.masked_fill_(~self._is_kept(kept, logits), float("-inf"))
        return logits

    def columns(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Local columns of global ids, and which of them are this rank's; the others point to column 0."""
        columns = labels - self.first
        mine = (columns >= 0) & (columns < self.real)
        return torch.where(mine, columns, 0), mine

    def spread(
        self,
        grad_logits: Tensor,
        hidden: Tensor,
        weight: Tensor,
        *,
        part: slice,
        grad_hidden: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """Carry the gradient of a chunk's logits [T, V_l] on to the hidden states and, if it is trained, the matrix."""
        if self.temperature != 1.0:
            grad_logits /= self.temperature
        half = grad_logits.to(hidden.dtype)
        torch.matmul(half, weight, out=grad_hidden[part])
        if grad_weight is not None:
            grad_weight += (half.t() @ hidden[part]).to(grad_weight.dtype)

    def _is_kept(self, kept: Tensor, like: Tensor) -> Tensor:
        columns, mine = self.columns(kept)
        # One column more, which takes the ids of other ranks.
        found = torch.zeros(len(kept), like.shape[1] + 1, dtype=torch.bool, device=like.device)
        found.scatter_(1, torch.where(mine, columns, like.shape[1]), value=True)
        return found[:, :-1] | (kept < 0).all(dim=1, keepdim=True)


def chunks(tokens: int) -> Iterator[slice]:
    """Rows whose logits exist at one time: never more than ``CHUNK_TOKENS``, nor than half of all."""
    size = max(1, min(CHUNK_TOKENS, -(-tokens // 2)))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _largest(logits: Tensor, group: Any) -> Tensor:
    """Maximum [T] over the whole vocabulary."""
    maximum = logits.max(dim=-1).values
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    return maximum
