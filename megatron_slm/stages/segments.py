"""Per-token values of a micro-batch, added up over sequences and over everything, whatever the packing and the cut.

A batch says of every label whether it counts (``loss_mask``) and to which sequence of the micro-batch it belongs
(``segments``, -1 where it does not count). Under context parallelism a rank holds part of a sequence: its sums are
completed over the cp group, and since every rank then goes on with the whole sum, the gradient of its own part is the
gradient it gets; there is nothing to reduce backward. What is counted by sequence is counted on the first cp rank
alone, because what a step logs and divides by is added up over the cp group.

What does not count is never multiplied by 0, but left out: NaN times 0 is NaN.

Shapes: B micro-batch, S sequence of this cp rank, N = B x S x cp (made even): as many sequences as there can be, so
that no shape depends on the data. Sequences 2k and 2k + 1 are the chosen and the rejected side of pair k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch

Logs = dict[str, Tensor]
"""Name -> [2], sum and count in float64."""

Loss = tuple[Tensor, Tensor, Logs]
"""Sum, its denominator (int), and what to log; the first logged name is the loss."""


class Segments(NamedTuple):
    """Which sequence each label of a micro-batch belongs to.

    Attributes:
        counted: bool [B, S], the labels that count.
        number: int64 [B, S], the label's sequence; N where it does not count.
        tokens: float64 [N], labels of each sequence on all cp ranks.
        cp: the context-parallel group, None without one.
    """

    counted: Tensor
    number: Tensor
    tokens: Tensor
    cp: Any

    @property
    def present(self) -> Tensor:
        """bool [N]: sequences with a label that counts."""
        return self.tokens > 0

    @property
    def first_rank(self) -> bool:
        """Whether this cp rank counts what is counted by sequence."""
        return self.cp is None or bool(self.cp.rank() == 0)

    def sums(self, values: Tensor) -> Tensor:
        """[B, S] -> [N]: of each sequence, on all cp ranks the same; 0 where there is none."""
        return completed(_local_sums(self.masked(values), self.number, len(self.tokens)), self.cp)

    def means(self, values: Tensor) -> Tensor:
        """[B, S] -> [N]: over the labels of each sequence."""
        return self.sums(values) / self.divisors(values)

    def divisors(self, values: Tensor) -> Tensor:
        """[N] in the precision of ``values``: labels of each sequence, 1 where there is none."""
        return self.tokens.clamp(min=1.0).to(values.dtype)

    def spread(self, of_sequences: Tensor) -> Tensor:
        """[N] -> [B, S]: at each label the number of its sequence; 0 where it does not count."""
        return torch.cat([of_sequences, of_sequences.new_zeros(1)])[self.number]

    def masked(self, values: Tensor) -> Tensor:
        """[B, S] -> [B, S], 0 where the label does not count; NaN there has no effect, on gradients either."""
        return torch.where(self.counted, values, 0.0)

    def total(self, values: Tensor) -> Tensor:
        """[B, S] -> []: over this rank's labels that count."""
        return self.masked(values).sum()

    def token_count(self) -> Tensor:
        """Labels of this rank that count: int []."""
        return self.counted.sum().to(torch.int)

    def sequence_count(self) -> Tensor:
        """Sequences of the micro-batch, on the first cp rank; 0 on the others: int []."""
        return self.once(self.present.sum()).to(torch.int)

    def once(self, value: Tensor) -> Tensor:
        """A number all cp ranks hold, so that it is counted once: 0 but on the first."""
        return value if self.first_rank else torch.zeros_like(value)


def segments_of(batch: Batch, cp: Any = None) -> Segments:
    """The sequences of a micro-batch of ``loss_mask`` and ``segments`` [B, S]. Collective over ``cp``."""
    group = cp if cp is not None and cp.size() > 1 else None
    counted = batch["loss_mask"] != 0
    most = counted.numel() * (group.size() if group is not None else 1)
    most += most % 2
    number = torch.where(counted, batch["segments"], most)
    tokens = completed(_local_sums(counted.double(), number, most), group)
    return Segments(counted, number, tokens, group)


def completed(partial: Tensor, cp: Any) -> Tensor:
    """Sums over the ``cp`` group (None: this rank's are whole) whose gradient is this rank's own."""
    if cp is None:
        return partial
    whole: Tensor = _SumForward.apply(partial, cp)
    return whole


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        whole = partial.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _local_sums(values: Tensor, number: Tensor, size: int) -> Tensor:
    """[B, S] -> [size]; what has the number ``size`` is left out."""
    sums = values.new_zeros(size + 1)
    return sums.index_add(0, number.flatten(), values.flatten())[:size]


def last_labels(segments: Segments, position_ids: Tensor) -> Tensor:
    """bool [B, S]: the last label of each sequence, by its position in the document. Collective over cp."""
    size = len(segments.tokens)
    last = position_ids.new_full((size + 1,), -1)
    last.scatter_reduce_(0, segments.number.flatten(), position_ids.flatten(), "amax")
    if segments.cp is not None:
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=segments.cp)
    return segments.counted & (position_ids == last[segments.number])


def pairs(of_sequences: Tensor) -> tuple[Tensor, Tensor]:
    """[N] -> chosen [N/2] and rejected [N/2]."""
    sides = of_sequences.view(-1, 2)
    return sides[:, 0], sides[:, 1]


def logged_pair(total: Tensor, count: Tensor) -> Tensor:
    """[2] in float64, as the log takes it; without gradient."""
    return torch.stack([total.detach().double(), count.double()])
