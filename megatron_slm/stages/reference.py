"""A frozen reference model: the log-probabilities that DPO compares with.

They are taken live, by the frozen copy in every step, or once before training, by sequence: a run then needs no second
model. Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.parallel.groups import is_last_pipeline_rank
from megatron_slm.parallel.lora import adapters_off
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import LOGPROB
from megatron_slm.rollout.score import scores
from megatron_slm.stages.pretrain import local_batch
from megatron_slm.train.step import StepPlan

FIELD = "ref_logprobs"


class Frozen(NamedTuple):
    """A model that is not trained: bare chunks in evaluation mode, laid out as the trained one.

    Attributes:
        without_adapters: the chunks are the trained ones, whose adapters are switched off for it.
    """

    chunks: list[nn.Module]
    without_adapters: bool = False

    def logprobs(self, micro_batches: Sequence[Batch], plan: StepPlan) -> list[Tensor]:
        """Log-probability [B, S/cp] of every label that counts, on the ranks that end the model. Collective."""
        local = list(micro_batches)
        with adapters_off(self.chunks) if self.without_adapters else nullcontext():
            found = scores(self.chunks, local, seq_length=plan.seq_length, groups=plan.groups)
        return [each[LOGPROB] for each in found]


def add_live(frozen: Frozen, micro_batches: Sequence[Batch], plan: StepPlan) -> None:
    """Give local micro-batches (``local_batch``) the field ``ref_logprobs`` on the ranks that end the model."""
    found = frozen.logprobs(micro_batches, plan)
    for batch, logprobs in zip(micro_batches, found, strict=False):
        batch[FIELD] = logprobs


def precompute(
    frozen: Frozen,
    batch_of: Callable[[Sequence[int]], tuple[Batch, list[int]]],
    rows: Sequence[int],
    num_documents: int,
    plan: StepPlan,
    *,
    micro_batch_size: int,
) -> np.ndarray:
    """Summed log-probabilities of the documents of ``rows``, float64 [documents]; NaN of others. Collective.

    Args:
        batch_of: the micro-batch of so many rows, whole and on the host, and the numbers of its documents.
        rows: the same on every rank; dealt over the data-parallel ranks.
        num_documents: of the source.
        micro_batch_size: rows of a forward pass.
    """
    groups = plan.groups
    found = torch.zeros(2, num_documents, dtype=torch.float64, device=plan.device)
    mine = micro_batch_size * groups.pp.size()  # an interleaved schedule takes whole pipelines of micro-batches
    for start in range(0, len(rows), mine * groups.dp.size()):
        first = start + mine * groups.dp.rank()
        # As many on every rank: at the end a row comes again, and its documents are counted again.
        numbers = [rows[min(at, len(rows) - 1)] for at in range(first, first + mine)]
        built = [batch_of(numbers[at : at + micro_batch_size]) for at in range(0, mine, micro_batch_size)]
        local = [local_batch(batch, plan) for batch, _ in built]
        logprobs = frozen.logprobs(local, plan)
        for batch, (_, documents), values in zip(local, built, logprobs, strict=False):
            _add(found, batch, documents, values, first=groups.cp.rank() == 0)
    if groups.tp.rank() != 0 or not is_last_pipeline_rank(groups):
        found.zero_()
    dist.all_reduce(found)
    sums, times = found.cpu().numpy()
    result: np.ndarray = np.where(times > 0, sums / np.maximum(times, 1.0), np.nan)
    return result


def _add(found: Tensor, batch: Batch, documents: Sequence[int], logprobs: Tensor, *, first: bool) -> None:
    """Add a local micro-batch to sums and times [2, documents]; the ``first`` cp rank counts the times."""
    numbers = torch.tensor(documents, device=found.device)
    counted = batch["loss_mask"] != 0
    found[0].index_add_(0, numbers[batch["segments"][counted]], logprobs[counted].double())
    if first:
        found[1].index_add_(0, numbers, torch.ones(len(documents), dtype=torch.float64, device=found.device))


def spread(batch: Batch, sums: np.ndarray) -> None:
    """Give a whole micro-batch ``ref_logprobs`` that add up to ``sums`` [documents], one for each of its segments.

    A loss of sums and means over a sequence does not see where in it they lie.
    """
    segments = batch["segments"]
    counted = segments >= 0
    lengths = torch.bincount(segments[counted], minlength=len(sums)).clamp(min=1)
    shares = torch.from_numpy(sums) / lengths
    field = torch.zeros(segments.shape, dtype=torch.float64)
    field[counted] = shares[segments[counted]]
    batch[FIELD] = field
