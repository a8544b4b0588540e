"""One rank's step, traced: built once, one micro-batch through each of its chunks, gradients finished, weights updated.

The second micro-batch is recorded: the first leaves what later ones find there (tables of rotary positions, kernels'
workspaces). :mod:`megatron_slm.memory.replay` plays the schedule with what one micro-batch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.schedule import BACKWARD, FINISH, FORWARD, UPDATE
from megatron_slm.memory.static import StaticPart, static_parts
from megatron_slm.memory.trace import Block, Phase, Recorder
from megatron_slm.parallel import pipeline
from megatron_slm.parallel.dry import dry_world
from megatron_slm.parallel.gradients import unwrap, zero_gradients
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages import pretrain
from megatron_slm.train.optimizer import apply_update, gradient_norm
from megatron_slm.train.optimizer_state import global_name
from megatron_slm.train.step import StepPlan

Build = Callable[[RunConfig, Any, torch.device, int], Any]
"""``run.build_model``: configuration, process groups, device, vocabulary -> chunks, optimizer."""
Plan = Callable[[RunConfig, Any, torch.device], StepPlan]
"""``run.step_plan``."""


@dataclass
class RankTrace:
    """What one rank allocates in a step.

    Attributes:
        rank: in the world.
        pipeline_rank, stages: its place in the pipeline.
        micro_batches: of a step, on this rank.
        blocks: every storage, by number.
        static: what exists between steps, divided among parameters.
        persistent: blocks beside the static ones that a micro-batch finds there.
        phases: by (name, chunk): "forward" and "backward" of each chunk, ("finish", 0), ("update", 0).
    """

    rank: int
    pipeline_rank: int
    stages: int
    micro_batches: int
    blocks: list[Block]
    static: list[StaticPart]
    persistent: list[int] = field(default_factory=list)
    phases: dict[tuple[str, int], Phase] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """Model chunks of the rank."""
        return sum(name == FORWARD for name, _ in self.phases)


def trace_rank(
    config: RunConfig,
    build: Build,
    plan: Plan,
    *,
    rank: int,
    world_size: int,
    vocab_size: int,
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> RankTrace:
    """Play ``rank`` in the dry world. ``device.preload("cpu")`` comes before.

    Args:
        kernels: what core is to take for its kernels meanwhile.
    """
    with (
        dry_world(config.parallel, rank=rank, world_size=world_size) as groups,
        kernels(),
        Recorder() as recorder,
    ):
        device = torch.device("cpu")
        built = build(config, groups, device, vocab_size)
        recorder.names = {
            module: global_name(unwrap(chunk), name)
            for chunk in built.chunks
            for name, module in unwrap(chunk).named_modules()
        }
        trace = RankTrace(
            rank,
            groups.pp.rank(),
            groups.pp.size(),
            config.train.global_batch_size // (config.train.micro_batch_size * groups.dp.size()),
            recorder.blocks,
            static_parts(built.chunks, built.optimizer, recorder),
        )
        _record_step(trace, recorder, built, plan(config, groups, device), config)
    return trace


def _record_step(trace: RankTrace, recorder: Recorder, built: Any, plan: StepPlan, config: RunConfig) -> None:
    existing = recorder.alive()
    zero_gradients(built.chunks)
    step = MicroBatch(built.chunks, plan, config)

    def begin(name: str, chunk: int) -> None:
        recorder.phase = trace.phases[name, chunk] = Phase()

    with _no_reduction(built.chunks):
        step.run(lambda name, chunk: None)
        trace.persistent = sorted(recorder.alive() - existing)
        step.run(begin)
    _close(trace, recorder.alive())
    begin(FINISH, 0)
    core = built.chunks[0].config
    core.finalize_model_grads_func(built.chunks, torch.ones((), dtype=torch.int))
    begin(UPDATE, 0)
    apply_update(built.optimizer, gradient_norm(built.optimizer))
    recorder.phase = Phase()


def _close(trace: RankTrace, alive: set[int]) -> None:
    """Let what a micro-batch leaves to the next one be what it has found: the same blocks every time."""
    made = {event for phase in trace.phases.values() for event in phase.events if event >= 0}
    gone = [number for number in trace.persistent if number not in alive]
    renamed: dict[int, int] = {}
    for new in sorted(made & alive):
        old = next((number for number in gone if trace.blocks[number].size == trace.blocks[new].size), None)
        if old is not None:
            gone.remove(old)
            renamed[new] = old
    for phase in trace.phases.values():
        phase.events = [renamed.get(event, event) for event in phase.events]


class MicroBatch:
    """One micro-batch through all chunks of a rank; what core's schedule keeps until the next one is kept here."""

    def __init__(self, chunks: list[Any], plan: StepPlan, config: RunConfig) -> None:
        self._chunks, self._plan, self._config = chunks, plan, config
        self._gradients: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(chunks)

    def run(self, begin: Callable[[str, int], None]) -> None:
        """Forward through every chunk, then backward; ``begin`` is told of each before it starts."""
        pairs = []
        for index, chunk in enumerate(self._chunks):
            begin(FORWARD, index)
            pairs.append(self._forward(chunk, index))
        for index, chunk in reversed(list(enumerate(self._chunks))):
            begin(BACKWARD, index)
            self._backward(chunk, index, *pairs.pop())

    def _forward(self, chunk: Any, index: int) -> tuple[Tensor | None, Tensor]:
        model = unwrap(chunk)
        received = None if model.pre_process else self._hidden().requires_grad_()
        batch = self._batch()
        groups = self._plan.groups
        output = pipeline.forward_chunk(chunk, batch, self._plan.loss, received, ends=model.post_process, groups=groups)
        if not model.post_process:
            pipeline.release_output(output, chunk)
        return received, output

    def _backward(self, chunk: Any, index: int, received: Tensor | None, output: Tensor) -> None:
        gradient = None if unwrap(chunk).post_process else self._hidden()
        found = pipeline.backward_chunk(chunk, received, output, gradient)
        self._gradients[index] = (found, gradient)

    def _batch(self) -> Batch:
        size, length = self._config.train.micro_batch_size, self._config.model.seq_length
        batch = {name: torch.zeros(size, length, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
        batch["loss_mask"] = torch.ones(size, length)
        return pretrain.local_batch(batch, self._plan)

    def _hidden(self) -> Tensor:
        """What one pipeline stage sends another, [S/(cp tp), B, H]."""
        groups, parallel = self._plan.groups, self._config.parallel
        length = self._config.model.seq_length // groups.cp.size()
        length //= groups.tp.size() if parallel.sequence_parallel else 1
        dtype = getattr(torch, self._config.precision.params_dtype)
        return torch.empty(length, self._config.train.micro_batch_size, self._config.model.hidden_size, dtype=dtype)


@contextmanager
def _no_reduction(chunks: list[Any]) -> Iterator[None]:
    """As the schedule runs every micro-batch but the last."""
    leave = [chunk.no_sync() for chunk in chunks]
    for context in leave:
        context.__enter__()
    try:
        yield
    finally:
        for context in leave:
            context.__exit__(None, None, None)
