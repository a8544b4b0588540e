"""What would make a job fit: single changes of its configuration, by the bytes they save and the seconds they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_slm.config.load import value_of
from megatron_slm.config.rules import violations
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.errors import ConfigError
from megatron_slm.memory.ledger import Ledger
from megatron_slm.memory.report import gib
from megatron_slm.train.config import PrecisionConfig

LedgersOf = Callable[[RunConfig], list[Ledger]]
SecondsOf = Callable[[RunConfig], float]


class Candidate(NamedTuple):
    """One change: what it is, and the keys it sets."""

    name: str
    values: dict[str, Any]


class Change(NamedTuple):
    """A candidate, judged by the stage that needs the most.

    Attributes:
        peak_bytes: expected, of that stage.
        saved_bytes: of the whole of it.
        added_seconds: of a step; None where no GPU is named.
    """

    candidate: Candidate
    peak_bytes: int
    saved_bytes: int
    added_seconds: float | None
    verdict: str

    def typed(self) -> str:
        """The change as it is typed behind ``mslm train``."""
        return " ".join(f"{key}={show(value)}" for key, value in self.candidate.values.items())


def changes(config: RunConfig, ledgers_of: LedgersOf, seconds_of: SecondsOf | None = None) -> list[Change]:
    """Every single change that saves memory and breaks no rule: those that fit first, then cheapest first.

    Args:
        ledgers_of: of a configuration; of the busiest stages at least.
        seconds_of: of a step of a configuration.
    """
    before = _peak(ledgers_of(config))
    seconds = seconds_of(config) if seconds_of is not None else None
    found = []
    for candidate in candidates(config):
        changed = with_values(config, candidate.values)
        if violations(changed):
            continue
        try:
            after = _peak(ledgers_of(changed))
            added = seconds_of(changed) - seconds if seconds_of is not None and seconds is not None else None
        except ConfigError:  # this GPU has no such format, or its rates are not known
            continue
        if after.size < before.size:
            found.append(Change(candidate, after.size, before.size - after.size, added, after.verdict))
    order = {"fits": 0, "tight": 1, "": 1, "does not fit": 2}
    return sorted(found, key=lambda one: (order[one.verdict], one.added_seconds or 0.0, -one.saved_bytes))


def cheapest(found: Sequence[Change], count: int = 3) -> list[Change]:
    """The first few that would fit; where none does, those that save the most."""
    fitting = [change for change in found if change.verdict == "fits"]
    return fitting[:count] or sorted(found, key=lambda change: -change.saved_bytes)[:count]


def candidates(config: RunConfig) -> Iterator[Candidate]:
    """Single changes, valid or not: recomputation, micro-batch, degrees, sharding, precision."""
    parallel, train, model = config.parallel, config.train, config.model
    if train.recompute_granularity is None:
        for module in ("layernorm", "core_attn", "mlp", "moe_act", "moe"):
            values = {"train.recompute_granularity": "selective", "train.recompute_modules": (module,)}
            yield Candidate(f"recompute {module}", values)
    if train.recompute_granularity != "full":
        yield Candidate(
            "recompute whole layers",
            {
                "train.recompute_granularity": "full",
                "train.recompute_method": "uniform",
                "train.recompute_num_layers": 1,
                "train.recompute_modules": type(train)().recompute_modules,
            },
        )
    if train.micro_batch_size > 1:
        yield Candidate("half the micro-batch", {"train.micro_batch_size": train.micro_batch_size // 2})
    if not parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        yield Candidate("sequence parallelism", {"parallel.sequence_parallel": True})
    for axis in ("tensor", "pipeline", "context", "expert"):
        if axis == "expert" and model.num_moe_experts is None:
            continue
        key = f"parallel.{axis}_model_parallel_size" if axis != "context" else "parallel.context_parallel_size"
        degree = getattr(parallel, key.removeprefix("parallel.")) * 2
        values = {key: degree} | ({"parallel.sequence_parallel": True} if axis == "tensor" else {})
        yield Candidate(f"{axis} parallelism over {degree}", values)
    if parallel.vpp_size > 1:
        yield Candidate("no interleaving", {"parallel.virtual_pipeline_model_parallel_size": None})
    if not parallel.use_distributed_optimizer:
        yield Candidate("divide the optimizer", {"parallel.use_distributed_optimizer": True})
    if not config.precision.bf16:
        yield Candidate("train in bf16", {"precision.bf16": True})
    else:
        if config.precision.accumulate_allreduce_grads_in_fp32:
            yield Candidate("gradients in bf16", {"precision.accumulate_allreduce_grads_in_fp32": False})
        yield from _in_fp8(config)


def _in_fp8(config: RunConfig) -> Iterator[Candidate]:
    """FP8 copies of weights are more than FP8 saves of activations, where few tokens are in flight."""
    precision, plain = config.precision, PrecisionConfig()
    if precision.fp8 is None:
        recipe = {"precision.fp8": "hybrid", "precision.fp8_recipe": "tensorwise"}
        yield Candidate("products in FP8", recipe)
        yield Candidate("products and weights in FP8", {**recipe, "precision.fp8_param_gather": True})
        return
    names = ("fp8", "fp8_recipe", "fp8_param_gather")
    changed = {f"precision.{name}": getattr(plain, name) for name in names}
    yield Candidate(
        "products in bf16", {key: value for key, value in changed.items() if value_of(config, key) != value}
    )
    if not precision.fp8_param_gather:
        yield Candidate("weights in FP8", {"precision.fp8_param_gather": True})


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """``config`` with other values of dotted keys."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def fit_table(found: Sequence[Change]) -> str:
    """One line for each change."""
    if not found:
        return "no single change saves memory"
    head = f"{'change':<34}{'peak GiB':>9}{'saves':>9}{'seconds':>10}  verdict"
    lines = [head]
    for change in found:
        seconds = "" if change.added_seconds is None else f"{change.added_seconds:+.2f}"
        cells = f"{gib(change.peak_bytes):>9}{gib(change.saved_bytes):>9}{seconds:>10}  {change.verdict:<13}"
        lines.append(f"{change.candidate.name:<34}{cells} {change.typed()}".rstrip())
    return "\n".join(lines)


def _peak(found: Sequence[Ledger]) -> Ledger:
    return max(found, key=lambda one: one.size)
