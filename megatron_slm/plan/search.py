"""Every layout of a job on a cluster: those that the rules allow, that fit, the fastest first. No torch."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_slm.config import rules_context, rules_experts, rules_fp8, rules_latent, rules_layout, rules_training
from megatron_slm.config.facts import Facts
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.plan.memory_estimate import MemoryOf, MemoryRange
from megatron_slm.plan.predict import Prediction, Question, least_seconds, predict
from megatron_slm.train.config import TrainConfig

LARGEST_TP, LARGEST_CP, LARGEST_VPP = 64, 64, 16
MICRO_BATCHES = (1, 2, 4, 8)
NONE, FULL, FEED, HALF = "none", "full", "selective", "half"
RECOMPUTE = (NONE, FEED, HALF, FULL)
"""Selective is the MLP or the experts of each layer; with fused attention its core has nothing worth recomputing. Half
is the first half of every chunk's layers, whole."""

NEAR_MISSES = 10

NEAR = 1.25
"""A layout whose least memory is above this many times the GPU's is no near miss, and is not timed."""

_RULES = (
    *rules_layout.RULES,
    *rules_context.RULES,
    *rules_experts.RULES,
    *rules_latent.RULES,
    *rules_training.RULES,
    *rules_fp8.RULES,
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
    counted: Sequence[tuple[bool, bool]] = ((False, False),)
    """Whether the embedding, and the output layer, count as layers of the pipeline split."""

    @classmethod
    def of(cls, config: RunConfig, gpus: int, gpus_per_node: int) -> Space:
        """What may divide this model over these GPUs; tp stays inside a node."""
        model = config.model
        tp = [size for size in _powers(LARGEST_TP) if size <= gpus_per_node and model.num_attention_heads % size == 0]
        counted = sorted({_counted(config), (False, False), (False, True), (True, True)}, key=_counted(config).__ne__)
        chunks = {model.num_layers + sum(pair) for pair in counted}
        pp = [size for size in range(1, max(chunks) + 1) if gpus % size == 0 and any(n % size == 0 for n in chunks)]
        vpp = [size for size in range(1, LARGEST_VPP + 1) if any(n % size == 0 for n in chunks)]
        cp = [size for size in _powers(LARGEST_CP) if gpus % size == 0]
        experts = model.num_moe_experts
        if experts is None:
            return cls(tp, pp, vpp, cp, [1], [1], counted=counted)
        ep = [size for size in range(1, experts + 1) if experts % size == 0 and gpus % size == 0]
        # Core's experts over tp train with sequence parallelism alone.
        return cls(tp, pp, vpp, cp, ep, tp, sequence_parallel=(True,), counted=counted)


PINNED = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "micro_batch": "train.micro_batch_size",
    "sequence_parallel": "parallel.sequence_parallel",
}
"""Axis of a space -> key that holds it to one value where the user gives it."""


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
    """The fastest of those that fit, fastest first."""
    near_misses: list[Candidate]
    """Faster than the fastest that fits, and too large or tight; fastest first. Where nothing fits or nearly does, the
    one that needs the least memory."""
    considered: int
    fits: int
    too_large: int
    refused: Counter[str] = field(default_factory=Counter)
    """Name of a rule -> layouts that broke it first."""


class Sized(NamedTuple):
    """A layout before its schedule is played."""

    least_seconds: float
    config: RunConfig
    memory: MemoryRange
    verdict: str


def search(question: Question, space: Space, memory_of: MemoryOf, *, allow_tight: bool = False, top: int = 50) -> Found:
    """Try every layout of a space.

    Every layout gets its memory and a lower bound of its step; schedules are played in the order of the bounds until no
    bound is below the slowest of the ``top``, so that these are the true ones.

    Args:
        question: the job; its layout is replaced.
        space: what is tried.
        memory_of: bytes of the fullest rank.
        allow_tight: layouts whose memory is expected to fit, but might not by its uncertainty, count as fitting.
        top: fitting layouts that are wanted.

    Raises:
        ConfigError: no layout is allowed by the rules.
    """
    refused: Counter[str] = Counter()
    fitting: list[Sized] = []
    large: list[Sized] = []
    smallest: Sized | None = None
    too_large, considered, capacity = 0, 0, question.cluster.memory_bytes
    for config in layouts(question.config, space, question.cluster.gpus):
        considered += 1
        if (rule := first_broken(config, question.cluster.gpus)) is not None:
            refused[rule] += 1
            continue
        memory = memory_of(config)
        if memory.low > NEAR * capacity:
            too_large += 1
            if smallest is None or memory.low < smallest.memory.low:
                smallest = Sized(0.0, config, memory, memory.verdict(capacity))
            continue
        verdict = memory.verdict(capacity)
        fits = verdict == "fits" or (allow_tight and verdict == "tight" and memory.expected <= capacity)
        least = least_seconds(dataclasses.replace(question, config=config))
        (fitting if fits else large).append(Sized(least, config, memory, verdict))
    if considered == sum(refused.values()):
        raise ConfigError(_nothing_allowed(question, considered, refused))
    best = fastest(question, fitting, top)
    limit = best[0].prediction.step_seconds if best else float("inf")
    near = fastest(question, [one for one in large if one.least_seconds < limit], NEAR_MISSES)
    near = [one for one in near if one.prediction.step_seconds < limit]
    if not best and not near and smallest is not None:
        near = fastest(question, [smallest], 1)
    return Found(best, near, considered, len(fitting), too_large + len(large), refused)


def fastest(question: Question, sized: list[Sized], top: int) -> list[Candidate]:
    """The ``top`` fastest layouts, fastest first."""
    found: list[Candidate] = []
    for one in sorted(sized, key=lambda one: one.least_seconds):
        if len(found) >= top and one.least_seconds >= found[top - 1].prediction.step_seconds:
            break
        prediction = predict(dataclasses.replace(question, config=one.config))
        bisect.insort(
            found,
            Candidate(one.config, one.memory, one.verdict, prediction),
            key=lambda candidate: candidate.prediction.step_seconds,
        )
    return found[:top]


def layouts(config: RunConfig, space: Space, gpus: int) -> Iterator[RunConfig]:
    """Every combination that divides the GPUs, the layers and the batch; combinations that mean the same come once."""
    batch, length = config.train.global_batch_size, config.model.seq_length
    dense = config.model.num_moe_experts is None
    for tp, pp, cp in itertools.product(space.tp, space.pp, space.cp):
        dp, left = divmod(gpus, tp * pp * cp)
        if left or batch % dp or length % (2 * cp if cp > 1 else 1):
            continue
        for vpp, ep, etp, micro in itertools.product(space.vpp, space.ep, space.etp, space.micro_batch):
            micro_batches, rest = divmod(batch, dp * micro)
            if cp > 1 and micro > min(space.micro_batch):
                continue  # as many tokens on a rank as with half of both
            counted = _split(config.model.num_layers, pp * vpp, space.counted)
            if rest or counted is None or (vpp > 1 and (pp == 1 or micro_batches % pp)):
                continue
            if gpus % ((tp if dense else etp) * ep * pp):
                continue
            degrees = Degrees(tp, pp, vpp, cp, ep, tp if dense else etp, counted)
            divisions = space.sequence_parallel if tp > 1 else (False,)
            several = (config.model.num_layers + sum(counted)) // (pp * vpp) > 1
            for recompute, divided in itertools.product(space.recompute, divisions):
                if recompute == HALF and not several:
                    continue
                yield with_layout(config, gpus, degrees, micro, (recompute, divided))


class Degrees(NamedTuple):
    """Sizes of the axes, and what counts as a layer of the pipeline split (embedding, output layer)."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    counted: tuple[bool, bool]


def with_layout(config: RunConfig, gpus: int, degrees: Degrees, micro: int, choice: tuple[str, bool]) -> RunConfig:
    """The configuration under another layout.

    Args:
        degrees: of every axis.
        micro: samples of a micro-batch.
        choice: what is recomputed, and whether sequences are divided over tp.
    """
    tp, pp, vpp, cp, ep, etp, (embedding, loss) = degrees
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
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )
    each = (config.model.num_layers + embedding + loss) // (pp * vpp)
    train = dataclasses.replace(config.train, micro_batch_size=micro, **_recomputation(recompute, each, dense=dense))
    return dataclasses.replace(config, parallel=parallel, train=train)


def _recomputation(choice: str, layers: int, *, dense: bool) -> dict[str, Any]:
    """Fields of ``train`` for one of :data:`RECOMPUTE` in chunks of so many layers."""
    method: dict[str, tuple[str | None, int | None]] = {FULL: ("uniform", 1), HALF: ("block", (layers + 1) // 2)}
    taken, count = method.get(choice, (None, None))
    modules = ("mlp",) if dense else ("moe",)
    return {
        "recompute_granularity": {NONE: None, HALF: FULL}.get(choice, choice),
        "recompute_method": taken,
        "recompute_num_layers": count,
        "recompute_modules": modules if choice == FEED else TrainConfig().recompute_modules,
    }


def first_broken(config: RunConfig, gpus: int) -> str | None:
    """Name of the first rule that a layout breaks."""
    facts = Facts(config, gpus)
    return next((rule.__name__ for rule in _RULES if next(rule(facts), None) is not None), None)


def _counted(config: RunConfig) -> tuple[bool, bool]:
    """Whether the embedding and the output layer count as layers of the split."""
    parallel = config.parallel
    return parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split


def _split(layers: int, chunks: int, counted: Sequence[tuple[bool, bool]]) -> tuple[bool, bool] | None:
    """The first way of counting by which the layers divide evenly over the chunks; None if there is none."""
    return next((pair for pair in counted if (layers + sum(pair)) % chunks == 0), None)


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent <= largest]


def _nothing_allowed(question: Question, considered: int, refused: Counter[str]) -> str:
    """Why no layout is left, with the way out."""
    cluster, batch = question.cluster, question.config.train.global_batch_size
    if not considered:
        return (
            f"No layout of {cluster.gpus} GPUs divides train.global_batch_size {batch} into whole micro-batches. "
            "Choose a global batch that is a multiple of the GPUs, or fewer GPUs."
        )
    worst = ", ".join(f"{name} ({count})" for name, count in refused.most_common(3))
    return f"None of {considered} layouts on {cluster.gpus} GPUs keeps every rule; most break: {worst}."
