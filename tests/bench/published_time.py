"""Step times of published runs: the measured program's kernels, and constants fitted on some tables for others."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_slm.errors import ConfigError
from megatron_slm.plan.cluster import cluster_of
from megatron_slm.plan.fit import fitted
from megatron_slm.plan.layer import Kernels
from megatron_slm.plan.predict import Question, predict
from megatron_slm.plan.rates import PUBLISHED, Rates
from tests.bench.published import GPUS, Case
from tests.bench.published_tables import kernel

EARLY = Kernels(
    flash_attention=False,
    hides_interleaved_sends=False,
    scatters_sends=True,
    gradient_bytes=2,
    accumulates_in_product=True,
    optimizer_bytes_per_parameter=60.0,
)
"""Megatron-LM of 2022: scores in memory, fp16 gradients reduced, an update over several passes."""

KERNELS: Mapping[str, Kernels] = MappingProxyType(
    {
        "K22": EARLY,
        "SC21": dataclasses.replace(EARLY, hides_input_gradient_exchange=False),
        "vTrain": dataclasses.replace(EARLY, hides_input_gradient_exchange=False),
        "ZB-T4": EARLY,
        "AlephLayouts": Kernels(
            hides_input_gradient_exchange=False, hides_interleaved_sends=False, optimizer_bytes_per_parameter=60.0
        ),
        "SimuMax": Kernels(accumulates_in_product=True),
        "DGXC": Kernels(accumulates_in_product=True, hides_tensor_exchange=True, gradient_bytes=2),
    }
)
"""How a source's name begins -> what its program runs."""

START = dataclasses.replace(
    PUBLISHED["ampere"],
    gemm_efficiency=0.75,
    gemm_half_size=80.0,
    attention_efficiency=0.4,
    memory_efficiency=0.8,
    nvlink_efficiency=0.75,
    network_efficiency=0.7,
    op_seconds=5e-6,
    host_seconds=5e-5,
    provenance={},
)
"""Round numbers that a fit begins with, so that what it has not seen stays unknown to it."""

FITTED = ("gemm_efficiency", "gemm_half_size", "memory_efficiency", "nvlink_efficiency", "network_efficiency")
"""Constants that tables of whole steps decide; the rest keep the start's."""

FLOPS_OF_SC21 = 96


@dataclass(frozen=True)
class Timed:
    """A case whose step time was measured and can be predicted.

    Attributes:
        question: what the planner is asked.
        seconds: measured.
    """

    case: Case
    question: Question
    seconds: float

    def predicted(self, rates: Rates) -> float:
        """Seconds of a step."""
        return predict(dataclasses.replace(self.question, rates=rates)).step_seconds

    def error(self, rates: Rates) -> float:
        """Predicted over measured, minus one."""
        return self.predicted(rates) / self.seconds - 1


def timed(cases: Sequence[Case]) -> list[Timed]:
    """The cases whose step time was measured and can be predicted."""
    found = []
    for case in cases:
        seconds, question = measured_seconds(case), question_of(case)
        if seconds is not None and question is not None:
            found.append(Timed(case, question, seconds))
    return found


def measured_seconds(case: Case) -> float | None:
    """Seconds of a step as printed, or from the printed FLOP/s by the table's own count."""
    if (seconds := case.measured("step_time_s")) is not None:
        return seconds
    rate = case.measured("tflops_per_gpu")
    if rate is None or not case.row.source.startswith("SC21"):
        return None
    model, batch = case.config.model, case.config.train.global_batch_size
    length, width = model.seq_length, model.hidden_size
    share = 1 + length / (6 * width) + (model.vocab_size or 0) / (16 * model.num_layers * width)
    flops = FLOPS_OF_SC21 * batch * length * model.num_layers * width**2 * share
    return flops / (rate * 1e12 * case.world_size)


def fit(groups: Sequence[Sequence[Timed]], names: Sequence[str] = FITTED, start: Rates = START) -> Rates:
    """Constants with the least mean error, every table counting the same."""
    kept = [group for group in groups if group]

    def loss(rates: Rates) -> float:
        return statistics.fmean(statistics.fmean(abs(math.log1p(run.error(rates))) for run in group) for group in kept)

    sources = sorted({run.case.row.source for group in kept for run in group})
    return fitted(start, names, loss, provenance=f"fitted on {', '.join(sources)}") if kept else start


def question_of(case: Case) -> Question | None:
    """What the planner is asked for a case; None where its program or its GPU is not described, or it is refused."""
    kernels = next((known for source, known in KERNELS.items() if case.row.source.startswith(source)), None)
    gpu = GPUS.get(case.gpu.partition("-")[0])
    if kernels is None or gpu is None:
        return None
    if case.row.source.startswith("AlephLayouts"):
        kernels = dataclasses.replace(
            kernels, fused_norm="RMS" in kernel(case.row), flash_attention="flash" in kernel(case.row)
        )
    try:
        question = Question(case.config, cluster_of(gpu).of_gpus(case.world_size), START, kernels)
        predict(question)
    except ConfigError:
        return None
    return question
