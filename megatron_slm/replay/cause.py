"""What kind of thing made two runs part, judged from where they part and from what they do not share. No torch.

A class is named together with its evidence. Where no recorded circumstance explains a difference whose inputs were
equal, what is left is that one of the two was computed wrongly, or by something that is not deterministic.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Divergence
from megatron_slm.replay.stream import Flag, Phase

NO_CAUSE = ("config.name", "config.log.", "config.replay.", "config.checkpoint.save", "config.checkpoint.keep",
            "config.checkpoint.async", "config.data.data_path", "config.data.sources", "config.data.replay_run",
            "config.data.loss_aware_strength", "config.tokenizer.", "config.train.train_iters", "config.train.eval_",
            "config.train.exit_", "config.train.early_stopping_patience", "surroundings.host", "surroundings.command",
            "surroundings.memory_bytes", "surroundings.git.", "step", "provenance.", "host", "slot", "cores",
            "fingerprints",
            "cursor.",
            "code.diff", "environment.TORCHELASTIC_", "environment.TORCHINDUCTOR_CACHE", "environment.TRITON_CACHE",
            "config.schedule.lr_decay_iters")  # fmt: skip
"""What may differ between two runs that compute the same numbers; of data and tokenizer the digests decide."""
CORPORA = ("config.data.data_path", "config.data.sources")
"""Where the corpora lie: no cause by itself, but said first where the digests are not the same."""
INTRA_OP, THREADS_VARIABLE = "threads.intra_op", "environment.OMP_NUM_THREADS"
REDUCTION = ("config.parallel.ddp_bucket_size", "config.parallel.overlap_", "config.parallel.use_distributed_optimizer",
             "config.parallel.reduce_scatter_with_fp32_accumulation", "buckets", "environment.NCCL_",
             "environment.GLOO_", "config.precision.accumulate_allreduce_grads_in_fp32")  # fmt: skip
KERNEL = ("threads.", "libraries.", "device", "switches.", "surroundings.cpu", "surroundings.versions.",
          "surroundings.python", "surroundings.platform", "surroundings.cpu_cores")  # fmt: skip
DATA = "data"
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("configuration", ("config.",)),
    ("code", ("code.",)),
    ("kernel or thread count", KERNEL),
    ("environment", ("environment.",)),
    (DATA, ("data.",)),
)
"""Asked in this order where the phase itself does not say."""
COMPUTED = (Phase.OUTPUT, Phase.LOSS, Phase.OUTPUT_GRADIENT, Phase.LOCAL_GRADIENT, Phase.OPERATION)


@dataclass(frozen=True)
class Circumstance:
    """One fact that the two runs do not share; ``rank`` is None where it is the whole run's."""

    key: str
    first: Any
    second: Any
    rank: int | None = None

    def __str__(self) -> str:
        where = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.key}: {_short(self.first)} and {_short(self.second)}{where}"


@dataclass(frozen=True)
class Cause:
    """A class, the facts that speak for it, and in a sentence why."""

    kind: str
    why: str
    evidence: tuple[Circumstance, ...]


def circumstances(first: Capsule, second: Capsule, step: int) -> list[Circumstance]:
    """Everything that differs between the two runs' manifests when they made ``step``, and may matter."""
    pairs: list[tuple[int | None, Mapping[str, Any], Mapping[str, Any]]] = [
        (None, first.manifest(step), second.manifest(step)),
        *((rank, first.manifest(step, rank), second.manifest(step, rank)) for rank in first.ranks),
    ]
    found = []
    for rank, one, other in pairs:
        here, there = _flat(one), _flat(other)
        # How many threads there were is known; the variable is one of the ways in which that came about.
        same_threads = INTRA_OP in here and here[INTRA_OP] == there.get(INTRA_OP)
        for key in sorted({*here, *there}):
            if here.get(key) == there.get(key) or key.startswith(NO_CAUSE) or key.endswith(".directory"):
                continue
            if key != THREADS_VARIABLE or not same_threads:
                found.append(Circumstance(key, here.get(key), there.get(key), rank))
    return found


def corpora_first(found: Sequence[Circumstance], first: Capsule, second: Capsule, step: int) -> list[Circumstance]:
    """The same, below the corpora's paths where the data are not the same."""
    if not _matching(found, ("data.",)):
        return list(found)
    here, there = _flat(first.manifest(step)), _flat(second.manifest(step))
    keys = sorted(key for key in {*here, *there} if key.startswith(CORPORA) and here.get(key) != there.get(key))
    return [*(Circumstance(key, here.get(key), there.get(key)) for key in keys), *found]


def cause(first: Capsule, second: Capsule, divergence: Divergence) -> Cause:
    """The class of what made the runs part."""
    found = circumstances(first, second, divergence.step)
    why = _cause_among(found, first, second, divergence)
    if why.kind != DATA:
        return why
    return Cause(why.kind, why.why, tuple(corpora_first(why.evidence, first, second, divergence.step)))


def _cause_among(found: Sequence[Circumstance], first: Capsule, second: Capsule, divergence: Divergence) -> Cause:
    phase = divergence.key.phase
    if divergence.only_in is not None:
        return _cause("configuration", "the runs do not have the same tensors", found, ("config.", "code."))
    if phase is Phase.BATCH:
        return _batch_cause(found)
    if phase is Phase.RNG:
        return _cause("random numbers", "a generator was in another state", found, ("config.train.seed",))
    if phase is Phase.GRADIENT and (reduction := _matching(found, REDUCTION)):
        why = "every rank's own gradients were equal, and the reduction adds them in another order"
        return Cause("communication order", why, tuple(reduction))
    if phase in (Phase.OPTIMIZER, Phase.PARAMETER) and (rates := _learning_rates(first, second, divergence)):
        own = _matching(found, ("config.schedule.", "config.optimizer.", "config.train.", "code."))
        return Cause("configuration", f"the learning rates were {rates[0]:.9g} and {rates[1]:.9g}", tuple(own))
    if divergence.start:
        why = "the state was other before the first step: it was built from or restored to something else"
        own = _matching(found, ("config.train.seed", "config.model.", "config.checkpoint.", "code."))
        return Cause("configuration" if own else "restored state", why, tuple(own))
    for kind, beginnings in CLASSES:
        if own := _matching(found, beginnings):
            return Cause(kind, "the inputs were equal, and this circumstance was not", tuple(own))
    if phase is Phase.GRADIENT:
        return Cause("silent corruption", "equal gradients were reduced to different ones, in equal circumstances", ())
    return Cause("silent corruption", "equal inputs gave different results, in equal circumstances", ())


def _batch_cause(found: Sequence[Circumstance]) -> Cause:
    why = "other samples or tokens were read"
    if own := _matching(found, ("data.",)):
        return Cause(DATA, why, tuple(own))
    own = _matching(found, ("config.data.", "config.train."))
    return Cause("configuration" if own else DATA, why, tuple(own))


def _cause(kind: str, why: str, found: Sequence[Circumstance], beginnings: tuple[str, ...]) -> Cause:
    return Cause(kind, why, tuple(_matching(found, beginnings)))


def _matching(found: Sequence[Circumstance], beginnings: tuple[str, ...]) -> list[Circumstance]:
    return [one for one in found if one.key.startswith(beginnings)]


def _learning_rates(first: Capsule, second: Capsule, divergence: Divergence) -> tuple[float, float] | None:
    """The rates of the step where they differ."""
    rates = []
    for capsule in (first, second):
        names = capsule.names(divergence.rank)
        for frame in capsule.frames(divergence.rank):
            if frame.step == divergence.step and not frame.flags & (Flag.START | Flag.ROOTS):
                chosen = [
                    record["lanes"][1]
                    for record in frame.records
                    if record["phase"] == Phase.STEP and names[record["name"]] == "grad_norm"
                ]
                rates += [struct.unpack("<d", struct.pack("<Q", int(bits)))[0] for bits in chosen]
    return (rates[0], rates[1]) if len(rates) == 2 and rates[0] != rates[1] else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names; lists are values."""
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
