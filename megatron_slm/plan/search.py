"""Every layout of a job on a cluster: those that the rules allow, that fit, the fastest first. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_slm.config.facts import Facts
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config import rules_context, rules_experts, rules_latent, rules_layout, rules_training
from megatron_slm.errors import ConfigError
from megatron_slm.plan.memory_estimate import MemoryOf, MemoryRange
from megatron_slm.plan.predict import Prediction, Question, predict

LARGEST_TP, LARGEST_CP, LARGEST_VPP = 64, 64, 16
MICRO_BATCHES = (1, 2, 4, 8)
NONE, FULL, FEED = "none", "full", "selective"
RECOMPUTE = (NONE, FEED, FULL)
"""Selective is the MLP or the experts of each layer; with fused attention its core has nothing worth recomputing."""

NEAR = 1.25
"""A layout whose least memory is above this many times the GPU's is no near miss, and is not timed."""

_RULES = (
    *rules_layout.RULES,
    *rules_context.RULES,
    *rules_experts.RULES,
    *rules_latent.RULES,
    *rules_training.RULES,
)
"""The rules that a layout can break; the rest of the configuration has been checked once."""


@dataclass(frozen=True)
class Space:
    """The values that are tried for every axis."""

    tp: Sequence[int]
    pp: Sequence[int]
    vpp: Sequence[int]
    cp: Sequence[int]
    ep: Sequence[int]
    etp: Sequence[int]
    micro_batch: Sequence[int] = MICRO_BATCHES
    recompute: Sequence[str] = RECOMPUTE
    sequence_parallel: Sequence[bool] = (True, False)

    @classmethod
    def of(cls, config: RunConfig, gpus: int, gpus_per_node: int) -> Space:
        """What may divide this model over these GPUs; tp stays inside a node."""
        model = config.model
        tp = [size for size in _powers(LARGEST_TP) if size <= gpus_per_node and model.num_attention_heads % size == 0]
        counted = model.num_layers + sum(_counted(config))
        pp = [size for size in range(1, counted + 1) if counted % size == 0 and gpus % size == 0]
        vpp = [size for size in range(1, LARGEST_VPP + 1) if counted % size == 0]
        experts = model.num_moe_experts
        ep = [size for size in range(1, experts + 1) if experts % size == 0 and gpus % size == 0] if experts else [1]
        return cls(tp, pp, vpp, [size for size in _powers(LARGEST_CP) if gpus % size == 0], ep, tp if experts else [1])


@dataclass(frozen=True)
class Candidate:
    """One layout with what it would do."""

    config: RunConfig
    memory: MemoryRange
    verdict: str
    prediction: Prediction


@dataclass(frozen=True)
class Found:
    """What a search comes to."""

    fitting: list[Candidate]
    """The fastest first."""
    near_misses: list[Candidate]
    """Faster than the fastest that fits, and too large; the fastest first."""
    considered: int
    too_large: int
    refused: Counter[str] = field(default_factory=Counter)
    """Name of a rule -> layouts that broke it first."""


def search(question: Question, space: Space, memory_of: MemoryOf, *, allow_tight: bool = True) -> Found:
    """Try every layout of a space.

    Args:
        question: the job; its layout is replaced.
        space: what is tried.
        memory_of: bytes of the fullest rank.
        allow_tight: layouts whose memory may turn out too large by its uncertainty count as fitting.

    Raises:
        ConfigError: no layout is allowed by the rules.
    """
    refused: Counter[str] = Counter()
    fitting, large, too_large, considered = [], [], 0, 0
    capacity = question.cluster.memory_bytes
    for config in layouts(question.config, space, question.cluster.gpus):
        considered += 1
        if (rule := first_broken(config, question.cluster.gpus)) is not None:
            refused[rule] += 1
            continue
        memory = memory_of(config)
        if memory.low > NEAR * capacity:
            too_large += 1
            continue
        verdict = memory.verdict(capacity)
        candidate = Candidate(config, memory, verdict, predict(dataclasses.replace(question, config=config)))
        fits = verdict == "fits" or (allow_tight and verdict == "tight" and memory.expected <= capacity)
        (fitting if fits else large).append(candidate)
    if considered == sum(refused.values()):
        raise ConfigError(_nothing_allowed(question, considered, refused))
    for found in (fitting, large):
        found.sort(key=lambda candidate: candidate.prediction.step_seconds)
    best = fitting[0].prediction.step_seconds if fitting else float("inf")
    near = [candidate for candidate in large if candidate.prediction.step_seconds < best]
    return Found(fitting, near, considered, too_large + len(large), refused)


def layouts(config: RunConfig, space: Space, gpus: int) -> Iterator[RunConfig]:
    """Every combination that divides the GPUs and the batch; combinations that mean the same come once."""
    batch, length = config.train.global_batch_size, config.model.seq_length
    for tp, pp, cp in itertools.product(space.tp, space.pp, space.cp):
        dp, left = divmod(gpus, tp * pp * cp)
        if left or batch % dp or length % (2 * cp if cp > 1 else 1):
            continue
        for vpp, ep, etp, micro in itertools.product(space.vpp, space.ep, space.etp, space.micro_batch):
            micro_batches, rest = divmod(batch, dp * micro)
            if cp > 1 and micro > min(space.micro_batch):
                continue  # as many tokens on a rank as with half of both
            if rest or gpus % (etp * ep * pp) or (vpp > 1 and (pp == 1 or micro_batches % pp)):
                continue
            for recompute, divided in itertools.product(space.recompute, space.sequence_parallel):
                if not (divided and tp == 1):
                    yield with_layout(config, gpus, (tp, pp, vpp, cp, ep, etp), micro, (recompute, divided))


def with_layout(
    config: RunConfig, gpus: int, degrees: tuple[int, int, int, int, int, int], micro: int, choice: tuple[str, bool]
) -> RunConfig:
    """The configuration under another layout.

    Args:
        degrees: tp, pp, vpp, cp, ep, etp.
        micro: samples of a micro-batch.
        choice: what is recomputed, and whether sequences are divided over tp.
    """
    tp, pp, vpp, cp, ep, etp = degrees
    recompute, divided = choice
    dense = config.model.num_moe_experts is None
    parallel = dataclasses.replace(
        config.parallel,
        world_size=gpus,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=None if dense or etp == tp else etp,
        sequence_parallel=divided,
    )
    modules = config.train.recompute_modules
    if recompute == FEED:
        modules = ("mlp",) if dense else ("moe",)
    train = dataclasses.replace(
        config.train,
        micro_batch_size=micro,
        recompute_granularity=None if recompute == NONE else recompute,
        recompute_method="uniform" if recompute == FULL else None,
        recompute_num_layers=1 if recompute == FULL else None,
        recompute_modules=modules if recompute == FEED else type(config.train)().recompute_modules,
    )
    return dataclasses.replace(config, parallel=parallel, train=train)


def first_broken(config: RunConfig, gpus: int) -> str | None:
    """Name of the first rule that a layout breaks."""
    facts = Facts(config, gpus)
    return next((rule.__name__ for rule in _RULES if next(rule(facts), None) is not None), None)


def _counted(config: RunConfig) -> tuple[bool, bool]:
    """Whether the embedding and the output layer count as layers of the split."""
    parallel = config.parallel
    return parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]


def _nothing_allowed(question: Question, considered: int, refused: Counter[str]) -> str:
    """Why no layout is left, with the way out."""
    cluster, batch = question.cluster, question.config.train.global_batch_size
    if not considered:
        return (
            f"No layout of {cluster.gpus} GPUs divides train.global_batch_size {batch} into whole micro-batches. Choose "
            "a global batch that is a multiple of the GPUs, or fewer GPUs."
        )
    worst = ", ".join(f"{name} ({count})" for name, count in refused.most_common(3))
    return f"None of {considered} layouts on {cluster.gpus} GPUs keeps every rule; most break: {worst}."
