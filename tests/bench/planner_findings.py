"""What the planner's report finds: memory, fits or not, step times, speed. Each part is a record of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_slm.config.load import load
from megatron_slm.plan.cluster import cluster_of
from megatron_slm.plan.memory_estimate import estimate
from megatron_slm.plan.predict import Question
from megatron_slm.plan.rates import PUBLISHED, Rates, rates_of
from megatron_slm.plan.search import Found, Space, search
from tests.bench.planner_metrics import (
    GIB,
    Errors,
    Pair,
    Regret,
    Verdicts,
    errors,
    leave_one_out,
    regret,
    verdicts,
    within,
)
from tests.bench.published import Case, NotCovered
from tests.bench.published_dry import Predicted, capacity_bytes
from tests.bench.published_static import kept_bytes, state_of
from tests.bench.published_tables import kernel
from tests.bench.published_time import Timed, fit, timed

Measured = dict[Any, "Predicted | str"]
"""Key of a case -> what was predicted, or why nothing was."""

STATIC_GIB, STATIC_SHARE = 0.1, 0.01
LARGE_GIB = 8.0
GOLDEN, SIMUMAX, ALEPH, VTRAIN, K22 = "MCore-golden", "SimuMax", "AlephLayouts", "vTrain", "K22-T5"
FOREIGN = (ALEPH, VTRAIN)
"""Tables that are judged with constants of all other tables."""
SAMPLE = 40
"""Rows of a large table that take part in a fit."""
LEFT_OUT_NAMES = ("gemm_efficiency",)
"""Constants that the other rows of K22-T5 move: so few rows carry no more."""


class Judged(NamedTuple):
    """One case with what was predicted of it, in GiB or seconds."""

    case: Case
    pair: Pair


@dataclass(frozen=True)
class MemoryFindings:
    """Static memory, peaks, and fits or not.

    Attributes:
        static, closed: of the golden rows, traced and in closed form.
        peaks: of SimuMax, and of the golden rows above ``LARGE_GIB``.
        small: the other golden peaks.
        fits: (verdict, went out of memory) of AlephLayouts' runs with FlashAttention.
        stopped: cases that could not be traced, and why.
    """

    static: list[Judged] = field(default_factory=list)
    closed: list[Judged] = field(default_factory=list)
    peaks: list[Judged] = field(default_factory=list)
    small: list[Judged] = field(default_factory=list)
    fits: list[tuple[Case, str, bool]] = field(default_factory=list)
    stopped: list[tuple[Case, str]] = field(default_factory=list)

    @property
    def static_share(self) -> float | None:
        """Of the golden rows that determine their model, those within 0.1 GiB or 1 %; an untraced one is not within."""
        told = [each.pair for each in self.static if determined(each.case)]
        missed = sum(determined(case) and case.row.source.startswith(GOLDEN) for case, _ in self.stopped)
        share = within(told, **_STATIC)
        return None if share is None else share * len(told) / (len(told) + missed)

    @property
    def peak_errors(self) -> Errors | None:
        """Of the large peaks."""
        return errors([each.pair for each in self.peaks])

    @property
    def verdicts(self) -> Verdicts | None:
        """Of AlephLayouts."""
        return verdicts([(verdict, oom) for _, verdict, oom in self.fits])


_STATIC = {"absolute": STATIC_GIB, "relative": STATIC_SHARE}


@dataclass(frozen=True)
class TimeFindings:
    """Step times.

    Attributes:
        by_source: with the planner's published rates.
        k22: rows of K22-T5 with those rates, which have not seen them.
        left_out: the same, each with constants moved by the other rows.
        foreign: source -> errors, regret and the rates fitted on every other source.
    """

    by_source: dict[str, Errors] = field(default_factory=dict)
    k22: list[Judged] = field(default_factory=list)
    left_out: list[Pair] = field(default_factory=list)
    foreign: dict[str, tuple[Errors, Regret | None, Rates]] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeedFindings:
    """The search.

    Attributes:
        layouts_per_second: considered, on one core.
        hand: model on GPUs -> the layout of the literature and its place among the planner's divisions, None where it
            is not among them.
    """

    layouts_per_second: float
    hand: dict[str, tuple[str, int | None, str]]


@dataclass(frozen=True)
class Findings:
    """Everything that the page says."""

    cases: list[Case | NotCovered]
    memory: MemoryFindings
    times: TimeFindings
    speed: SpeedFindings
    cpu: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The JSON line; None where the given rows hold nothing to judge it by."""
        memory, foreign = self.memory, self.times.foreign.values()
        peaks, fits = memory.peak_errors, memory.verdicts
        regrets = [found.mean for _, found, _ in foreign if found is not None]
        foreign_means = [found.mean for found, _, _ in foreign]
        golden = [case for case in self.cases if case.row.source.startswith(GOLDEN)]
        loo = errors(self.times.left_out)
        found = {
            "cpu_static_exact_share": self.cpu.get("cpu_static_exact_share"),
            "cpu_activation_exact_share": self.cpu.get("cpu_activation_exact_share"),
            "cpu_peak_worst_pct": self.cpu.get("cpu_peak_worst_pct"),
            "golden_static_within_share": memory.static_share,
            "golden_rows_covered_share": _share([isinstance(case, Case) for case in golden]),
            "peak_mae_pct": peaks.mean if peaks else None,
            "peak_worst_pct": peaks.worst if peaks else None,
            "false_fit_pct": fits.false_fit if fits else None,
            "false_oom_pct": fits.false_oom if fits else None,
            "k22_step_time_mean_pct": loo.mean if loo else None,
            "k22_step_time_elsewhere_pct": _mean([abs(100 * each.pair.error) for each in self.times.k22]),
            "leave_one_source_out_mape_pct": _mean(foreign_means),
            "top_pick_regret_pct": _mean(regrets),
            "plan_layouts_per_s": self.speed.layouts_per_second,
        }
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def determined(case: Case) -> bool:
    """Whether the row, or a rule that does not look at its memory, says everything that decides static memory."""
    return "gpus-release" not in case.inferred


def wanted_memory(cases: Sequence[Case]) -> list[Case]:
    """Cases whose memory is judged."""
    return [
        case
        for case in cases
        if case.row.source.startswith((GOLDEN, SIMUMAX))
        or (case.row.source.startswith(ALEPH) and "flash" in kernel(case.row))
    ]


def judged_memory(cases: Sequence[Case], measured: Measured) -> MemoryFindings:
    """Predictions beside measurements; cases that were not traced are left out."""
    found = MemoryFindings()
    for case in wanted_memory(cases):
        predicted = measured.get(case.key)
        if isinstance(predicted, str):
            found.stopped.append((case, predicted))
        elif predicted is not None:
            _judge(case, predicted, found)
    return found


def _judge(case: Case, predicted: Predicted, found: MemoryFindings) -> None:
    if case.row.source.startswith(ALEPH):
        if (capacity := capacity_bytes(case.gpu)) is not None:
            found.fits.append((case, predicted.verdict(capacity), case.row.text("status") == "OOM"))
        return
    if (static := case.measured("static_mem_gib")) is not None:
        closed = state_of(case.config, predicted.stage, case.world_size).total + sum(kept_bytes(case).values())
        found.static.append(Judged(case, Pair(predicted.static / GIB, static)))
        found.closed.append(Judged(case, Pair(closed / GIB, static)))
    if (peak := case.measured("peak_mem_gib")) is not None:
        large = case.row.source.startswith(SIMUMAX) or peak > LARGE_GIB
        (found.peaks if large else found.small).append(Judged(case, Pair(predicted.peak / GIB, peak)))


def step_times(cases: Sequence[Case], *, quick: bool) -> TimeFindings:
    """Predicted step times beside measured ones."""
    runs = timed(cases)
    by_source: dict[str, list[Timed]] = {}
    for run in runs:
        by_source.setdefault(run.case.row.source, []).append(run)
    found = TimeFindings()
    for source, group in by_source.items():
        known = errors([run_pair(run, published_rates(run)) for run in group])
        if known is not None:
            found.by_source[source] = known
    k22 = by_source.get(K22, [])
    found.k22.extend(Judged(run.case, run_pair(run, published_rates(run))) for run in k22)
    found.left_out.extend(leave_one_out(k22, _with_the_others) if len(k22) > 1 else [])
    for source, group in by_source.items():
        if source.startswith(FOREIGN) and not quick:
            found.foreign[source] = _as_foreigner(source, group, runs)
    return found


def published_rates(run: Timed) -> Rates:
    """What the planner takes without further measurement."""
    return PUBLISHED[run.question.cluster.architecture]


def run_pair(run: Timed, rates: Rates) -> Pair:
    """Seconds."""
    return Pair(run.predicted(rates), run.seconds)


def _with_the_others(others: Sequence[Timed], run: Timed) -> Pair:
    return run_pair(run, fit([list(others)], LEFT_OUT_NAMES, published_rates(run)))


def _as_foreigner(source: str, group: list[Timed], runs: Sequence[Timed]) -> tuple[Errors, Regret | None, Rates]:
    """One table judged with constants that were fitted on all other tables of its GPU."""
    architecture = group[0].question.cluster.architecture
    others: dict[str, list[Timed]] = {}
    for run in runs:
        if run.case.row.source != source and run.question.cluster.architecture == architecture:
            others.setdefault(run.case.row.source, []).append(run)
    rates = fit([rows[:: -(-len(rows) // SAMPLE)] for rows in others.values()])
    chosen = regret(group, _choice, lambda run: run_pair(run, rates))
    known = errors([run_pair(run, rates) for run in group])
    assert known is not None, "a source has rows"
    return known, chosen, rates


def _choice(run: Timed) -> tuple[str, ...]:
    """What a planner is asked at once: everything but the layout."""
    row = run.case.row
    return (row.source, row.text("model"), row.text("gpus"), row.text("seq_len"), kernel(row))


HAND: Mapping[str, tuple[tuple[str, ...], str, int, dict[str, int]]] = {
    "Llama-3 405B, 16,384 x H100": (("preset=llama3-405b",), "h100-80gb", 2048, {"tp": 8, "pp": 16, "gpus": 16384}),
    "GPT-175B, 1,024 x A100": (
        (
            "model.num_layers=96",
            "model.hidden_size=12288",
            "model.num_attention_heads=96",
            "model.vocab_size=51200",
            "model.seq_length=2048",
            "model.swiglu=false",
            "model.normalization=LayerNorm",
            "model.position_embedding_type=learned_absolute",
            "model.add_bias_linear=true",
            "model.untie_embeddings_and_output_weights=false",
        ),
        "a100-80gb",
        1536,
        {"tp": 8, "pp": 8, "gpus": 1024},
    ),
}
"""Model and GPUs -> configuration, cluster, global batch, and the division of the literature (arXiv 2407.21783 table 4,
arXiv 2104.04473 and 2205.05198)."""


def planner_speed(*, quick: bool) -> SpeedFindings:
    """Time the search, and find the layouts of the literature in what it returns."""
    hand: dict[str, tuple[str, int | None, str]] = {}
    considered, seconds = 0, 0.0
    for name, (tokens, cluster_name, batch, wanted) in list(HAND.items())[1 if quick else 0 :]:
        started = time.perf_counter()
        found = _search(tokens, cluster_name, batch, wanted["gpus"])
        seconds += time.perf_counter() - started
        considered += found.considered
        place = place_of(found, wanted["tp"], wanted["pp"])
        first = found.fitting[0].config.parallel if found.fitting else None
        best = (
            f"tp{first.tensor_model_parallel_size} pp{first.pipeline_model_parallel_size} vpp{first.vpp_size} "
            f"cp{first.context_parallel_size}"
            if first
            else "none fits"
        )
        hand[name] = (f"tp{wanted['tp']} pp{wanted['pp']}", place, best)
    return SpeedFindings(considered / seconds, hand)


def _search(tokens: Sequence[str], cluster_name: str, batch: int, gpus: int) -> Found:
    own = [f"parallel.world_size={gpus}", f"train.global_batch_size={batch}", "precision.bf16=true"]
    config = load(None, [*tokens, *own]).config
    cluster = cluster_of(cluster_name).of_gpus(gpus)
    question = Question(config, cluster, rates_of(cluster.architecture))
    return search(question, Space.of(config, gpus, cluster.gpus_per_node), estimate, allow_tight=True, top=200)


def place_of(found: Found, tp: int, pp: int) -> int | None:
    """Place, from 1, of a division among the distinct (tp, pp, cp) of the fastest layouts; None where it is not."""
    seen: list[tuple[int, int, int]] = []
    for candidate in found.fitting:
        parallel = candidate.config.parallel
        degrees = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        if degrees not in seen:
            seen.append(degrees)
        if degrees[:2] == (tp, pp):
            return seen.index(degrees) + 1
    return None


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
