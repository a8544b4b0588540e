"""One rollout: prompts answered, judged, and made into the micro-batches that a policy loss is given.

Every model copy (tp x pp ranks) answers its own prompts. What a loss needs is known on the ranks that end the model;
the others run the same micro-batches without it.

Shapes: P prompts of this copy, G samples of each, N = P x G, B micro-batch, S slots of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.data.examples.prompts import Prompt
from megatron_slm.parallel.groups import is_last_pipeline_rank
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_scores import LOGPROB
from megatron_slm.rollout import gap
from megatron_slm.rollout.config import GapLimits
from megatron_slm.rollout.generate import complete
from megatron_slm.rollout.sampling import Sampling
from megatron_slm.rollout.score import scores
from megatron_slm.stages.pretrain import local_batch
from megatron_slm.stages.sequences import Drawn, Shape, filled_up, lay_out
from megatron_slm.train.step import StepPlan


class Judged(NamedTuple):
    """What an answer is worth: the weighted sum, NaN where it could not be scored, and its parts by name."""

    total: float
    parts: dict[str, float]


Judge = Callable[[Sequence[Drawn], Sequence[Prompt]], list[Judged]]
"""Scores answers to prompts. Collective over a model copy, the same on all of its ranks."""

Advantages = Callable[["Experience"], dict[str, float]]
"""Gives the micro-batches of an experience what the stage's loss reads; returns what is logged. On the ranks that end
the model alone; collective over dp."""


@dataclass
class Experience:
    """One mini-batch of sequences, scored, as micro-batches on the device.

    Attributes:
        drawn: sequences of this copy, the samples of each prompt together.
        judged: of each.
        counts: whether each sequence is trained on.
        batches: micro-batches; ``old_logprobs`` is there on the ranks that end the model.
        owners: of each micro-batch which sequences its segments are.
        group_size: G.
    """

    drawn: list[Drawn]
    judged: list[Judged]
    counts: list[bool]
    batches: list[Batch]
    owners: list[list[int]]
    group_size: int

    def spread(self, values: Sequence[float], batch: Batch, own: Sequence[int]) -> Tensor:
        """Numbers [N] of sequences, at the labels of a micro-batch that holds the sequences ``own``: [B, S]."""
        segments = batch["segments"]
        of_segments = torch.tensor([*(values[at] for at in own), 0.0], dtype=torch.float64, device=segments.device)
        return of_segments[segments]  # -1 is the last one

    def leave_out(self, dropped: Sequence[bool]) -> None:
        """Train on the marked sequences no more."""
        for batch, own in zip(self.batches, self.owners, strict=True):
            out = self.spread([float(each) for each in dropped], batch, own) != 0
            batch["loss_mask"] = batch["loss_mask"].masked_fill(out, 0.0)
            batch["segments"] = batch["segments"].masked_fill(out, -1)
        self.counts = [counts and not out for counts, out in zip(self.counts, dropped, strict=True)]


class Sampler(NamedTuple):
    """How this run answers prompts.

    Attributes:
        chunks: the policy.
        sampling: of the completions.
        group_size: samples of each prompt.
        vocab_size: real tokens.
        batch_size: sequences generated at a time.
    """

    chunks: list[nn.Module]
    sampling: Sampling
    group_size: int
    vocab_size: int
    batch_size: int

    def answer(self, prompts: Sequence[tuple[int, Prompt]], step: int, plan: StepPlan) -> list[Drawn]:
        """``group_size`` completions of each (position, prompt), one prompt after another. Collective."""
        size = self.group_size
        samples = [position * size + number for position, _ in prompts for number in range(size)]
        tokens = [prompt.tokens for _, prompt in prompts for _ in range(size)]
        found = complete(
            self.chunks,
            tokens,
            self.sampling,
            step=step,
            samples=samples,
            groups=plan.groups,
            vocab_size=self.vocab_size,
            device=plan.device,
            batch_size=self.batch_size,
        )
        return [Drawn(*each) for each in zip(samples, tokens, found, strict=True)]


def experience(
    drawn: list[Drawn],
    judged: list[Judged],
    *,
    chunks: list[nn.Module],
    group_size: int,
    mask_truncated: bool,
    plan: StepPlan,
    micro_batch_size: int,
    eod_id: int,
    gap_limits: GapLimits,
) -> tuple[Experience, dict[str, float]]:
    """Sequences as micro-batches with the log-probabilities of the policy before it learns from them. Collective.

    A sequence that could not be scored is not trained on; nor is one that did not end, where ``mask_truncated``.

    Returns:
        The experience, and the distance between generation and training, to be logged.

    Raises:
        RolloutError: on every rank, when that distance is too large.
    """
    counts = [
        not math.isnan(one.total) and (each.completion.finished or not mask_truncated)
        for each, one in zip(drawn, judged, strict=True)
    ]
    shape = Shape(plan.seq_length, micro_batch_size, eod_id)
    laid = lay_out(drawn, shape, counts=counts)
    laid = filled_up(laid, micro_batches_of_all(len(laid.batches), chunks, plan), shape)
    batches = [local_batch(batch, plan) for batch in laid.batches]
    old = scores(chunks, batches, seq_length=plan.seq_length, groups=plan.groups)
    for batch, found in zip(batches, old, strict=False):
        batch["old_logprobs"] = found[LOGPROB]
    measured = [
        gap.measure(
            batch["old_logprobs"], batch["generation_logprobs"], batch["segments"], [drawn[at].sample for at in own]
        )
        for batch, own in zip(batches, laid.owners, strict=True)
        if "old_logprobs" in batch and plan.groups.tp.rank() == 0  # the others have the same
    ]
    whole = gap.joined(_of_everyone(measured))
    gap.require(whole, gap_limits)
    return Experience(drawn, judged, counts, batches, laid.owners, group_size), whole.metrics


def micro_batches_of_all(mine: int, chunks: list[nn.Module], plan: StepPlan) -> int:
    """As many micro-batches as the rank with the most has; whole pipelines of them where chunks are interleaved."""
    most = torch.tensor([mine], device=plan.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    stages = plan.groups.pp.size() if len(chunks) > 1 else 1
    return max(1, -(-int(most) // stages)) * stages


def sums_over_copies(values: Sequence[float], plan: StepPlan) -> list[float]:
    """Add numbers up over the model copies. Collective over dp."""
    total = torch.tensor(values, dtype=torch.float64, device=plan.device)
    dist.all_reduce(total, group=plan.groups.dp)
    found: list[float] = total.tolist()
    return found


def of_rewards(found: Experience, names: Sequence[str], plan: StepPlan) -> dict[str, float]:
    """TRL's numbers of a rollout's rewards and lengths. Collective over dp.

    Args:
        names: of the parts of the reward.
    """
    scored = [one for one in found.judged if not math.isnan(one.total)]
    lengths = [len(each.completion.tokens) for each in found.drawn]
    columns: dict[str, list[float]] = {
        "reward": [one.total for one in scored],
        **{f"rewards/{name}/mean": [one.parts[name] for one in found.judged if name in one.parts] for name in names},
        "completions/mean_length": [float(length) for length in lengths],
        "completions/clipped_ratio": [float(not each.completion.finished) for each in found.drawn],
        "completions/unscored_ratio": [float(math.isnan(one.total)) for one in found.judged],
    }
    numbers = [[math.fsum(column), math.fsum(x * x for x in column), len(column)] for column in columns.values()]
    flat = sums_over_copies([number for row in numbers for number in row], plan)
    logged: dict[str, float] = {}
    for place, name in enumerate(columns):
        total, squares, count = flat[3 * place : 3 * place + 3]
        mean = total / count if count else math.nan
        logged[name] = mean
        if name.startswith("reward"):
            key = "reward_std" if name == "reward" else name.removesuffix("mean") + "std"
            logged[key] = math.sqrt(max(0.0, squares / count - mean * mean)) if count else math.nan
    return logged


def of_all_copies(values: Tensor, plan: StepPlan) -> tuple[Tensor, slice]:
    """[N] of this copy -> those of all copies, and where this one's are. Collective over dp."""
    size, rank = plan.groups.dp.size(), plan.groups.dp.rank()
    parts = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(parts, values.contiguous(), group=plan.groups.dp)
    return torch.cat(parts), slice(rank * len(values), (rank + 1) * len(values))


def ends_model(plan: StepPlan) -> bool:
    """Whether this rank computes the loss."""
    return is_last_pipeline_rank(plan.groups)


def _of_everyone(mine: list[Any]) -> list[Any]:
    """Small things of all ranks, on all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [each for part in everyone for each in part]
