"""A run, built: what taking steps needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_slm.config.load import Resolved
from megatron_slm.launch.signals import StopRequest
from megatron_slm.parallel.layout import Layout
from megatron_slm.run_data import Data
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.step import StepPlan, TrainState


class Run(NamedTuple):
    """Everything that taking steps needs, built; ``log`` is there on the rank that writes it."""

    resolved: Resolved
    layout: Layout
    data: Data
    directory: RunDirectory
    stop: StopRequest
    state: TrainState
    plan: StepPlan
    loader: Any
    log: MetricsWriter | None

    @property
    def vocab_size(self) -> int:
        """Real tokens."""
        return self.resolved.config.model.vocab_size or self.data.tokenizer.vocab_size
