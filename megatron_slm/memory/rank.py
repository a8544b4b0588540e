"""One rank's step, traced: built once, one micro-batch through each of its chunks, gradients finished, weights updated.

The second micro-batch is recorded: the first leaves what later ones find there (tables of rotary positions, kernels'
workspaces). :mod:`megatron_slm.memory.replay` plays the schedule with what one micro-batch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.schedule import BACKWARD, FINISH, FORWARD, UPDATE
from megatron_slm.memory.static import OTHER_MODELS, WORKSPACE, StaticPart, static_parts
from megatron_slm.memory.trace import COMMUNICATION, Block, Phase, Recorder, TemporaryBytes
from megatron_slm.parallel import pipeline
from megatron_slm.parallel.dry import dry_world
from megatron_slm.parallel.gradients import unwrap, zero_gradients
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages import pretrain
from megatron_slm.train.optimizer import apply_update, gradient_norm
from megatron_slm.train.optimizer_state import global_name
from megatron_slm.train.step import StepPlan

Build = Callable[[RunConfig, Any, torch.device, int], Any]
"""``run_model.build_model``: configuration, process groups, device, vocabulary -> chunks, optimizer."""
Plan = Callable[[RunConfig, Any, torch.device], StepPlan]
"""``run.step_plan``."""
BuildBeside = Callable[[RunConfig, Any, torch.device, int, list[nn.Module]], Any]
"""The same of another model, given the chunks of the traced one -> what must be referred to as long as it is there."""
Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape, whole in S, and type of each tensor of a micro-batch."""


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
        batch: blocks of one micro-batch's tokens; those of a step are there as long as it lasts.
        exchanged: block that stands for every tensor between pipeline ranks; see ``memory.exchange``.
        frees_outputs: an output's memory is given back once it is sent.
        phases: by (name, chunk): "forward" and "backward" of each chunk, ("finish", 0), ("update", 0).
    """

    rank: int
    pipeline_rank: int
    stages: int
    micro_batches: int
    blocks: list[Block]
    static: list[StaticPart]
    persistent: list[int] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    exchanged: int | None = None
    frees_outputs: bool = False
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
    temporary_bytes: TemporaryBytes | None = None,
    notes_saved: bool = False,
    beside: Mapping[str, BuildBeside] | None = None,
    fields: Fields | None = None,
) -> RankTrace:
    """Play ``rank`` in the dry world. ``device.preload("cpu")`` comes before.

    Args:
        kernels: what core is to take for its kernels meanwhile.
        temporary_bytes: what a collective's backend allocates for itself.
        notes_saved: fill ``Phase.packed``. Not with ``kernels``: torch hands a saved weight on as another object, and
            they look for ``main_grad`` on it.
        beside: other models by name, built after the traced one; none of them is run.
        fields: of a micro-batch; default those of pretraining.
    """
    with (
        dry_world(config.parallel, rank=rank, world_size=world_size) as groups,
        kernels(),
        Recorder(temporary_bytes, notes_saved=notes_saved) as recorder,
    ):
        device = torch.device("cpu")
        built = build(config, groups, device, vocab_size)
        recorder.names = module_names(built.chunks)
        trace = RankTrace(
            rank,
            groups.pp.rank(),
            groups.pp.size(),
            config.train.global_batch_size // (config.train.micro_batch_size * groups.dp.size()),
            recorder.blocks,
            static_parts(built.chunks, built.optimizer, recorder),
        )
        kept = []  # as long as the step lasts
        for name, build_other in (beside or {}).items():
            before = recorder.alive()
            kept.append(build_other(config, groups, device, vocab_size, built.chunks))
            more = sorted(recorder.alive() - before)
            trace.static += [StaticPart(number, 0, OTHER_MODELS, name, recorder.blocks[number].size) for number in more]
        step = MicroBatch(built.chunks, plan(config, groups, device), config, recorder, fields or text_fields(config))
        _record_step(trace, recorder, built, step)
    return trace


def module_names(chunks: list[Any]) -> dict[nn.Module, str]:
    """Global name of every module of a rank."""
    return {
        module: global_name(unwrap(chunk), name) for chunk in chunks for name, module in unwrap(chunk).named_modules()
    }


def text_fields(config: RunConfig) -> Fields:
    """What a micro-batch of pretraining holds."""
    shape = (config.train.micro_batch_size, config.model.seq_length)
    whole = dict.fromkeys(("tokens", "labels", "position_ids"), (shape, torch.int64))
    return {**whole, "loss_mask": (shape, torch.float32)}


def _record_step(trace: RankTrace, recorder: Recorder, built: Any, step: MicroBatch) -> None:
    existing = recorder.alive()
    zero_gradients(built.chunks)
    with _no_reduction(built.chunks):
        step.run({})
        trace.persistent = sorted(recorder.alive() - existing - step.outside)
        step.run(trace.phases)
    for phase in trace.phases.values():
        phase.events = _own(phase, step.outside)
    _close(trace, recorder.alive())
    trace.batch, trace.exchanged, trace.frees_outputs = step.batch, step.exchanged, step.frees_outputs
    recorder.phase = trace.phases[FINISH, 0] = Phase()
    core = built.chunks[0].config
    core.finalize_model_grads_func(built.chunks, torch.ones((), dtype=torch.int))
    recorder.phase = trace.phases[UPDATE, 0] = Phase()
    apply_update(built.optimizer, gradient_norm(built.optimizer))
    recorder.phase = Phase()


def _own(phase: Phase, outside: set[int]) -> list[int]:
    """A phase's events without those of blocks that the schedule holds, but for the birth of the one it makes."""
    return [
        event for event in phase.events if event == phase.output or (event if event >= 0 else ~event) not in outside
    ]


def _close(trace: RankTrace, alive: set[int]) -> None:
    """Let what a micro-batch leaves to the next one be what it has found: the same blocks every time.

    What a backward pass leaves takes the place of what the one before has left. What a forward pass has made and the
    backward pass has used, and still is referred to, takes such a place when the backward pass ends.
    """
    gone = [number for number in trace.persistent if number not in alive]
    for (name, chunk), phase in trace.phases.items():
        for new in [event for event in phase.events if event in alive and event != phase.output]:
            old = next((number for number in gone if trace.blocks[number].size == trace.blocks[new].size), None)
            if old is None:
                continue
            gone.remove(old)
            if name == FORWARD:
                trace.phases[BACKWARD, chunk].events += [~new, old]
            else:
                phase.events[phase.events.index(new)] = old


class MicroBatch:
    """One micro-batch through all chunks of a rank, recorded.

    Attributes:
        outside: blocks that the schedule holds, not a pass: tokens, and what pipeline ranks exchange.
        batch: those of the tokens.
        exchanged: one of those that are exchanged; all are as large.
        frees_outputs: an output's memory is given back once it is sent.
    """

    def __init__(
        self, chunks: list[Any], plan: StepPlan, config: RunConfig, recorder: Recorder, fields: Fields
    ) -> None:
        self._chunks, self._plan, self._config, self._recorder = chunks, plan, config, recorder
        self._fields = fields
        self.outside: set[int] = set()
        self.batch: list[int] = []
        self.exchanged: int | None = None
        self.frees_outputs: bool = chunks[0].config.deallocate_pipeline_outputs

    def run(self, phases: dict[tuple[str, int], Phase]) -> None:
        """Forward through every chunk, then backward; ``phases`` receives what each does."""
        before = self._recorder.alive()
        batch = self._batch()
        self.batch = sorted(self._recorder.alive() - before)
        self._set_outside(self.batch, WORKSPACE)
        passed = []
        for index, chunk in enumerate(self._chunks):
            received = None if unwrap(chunk).pre_process else self._hidden().requires_grad_()
            phases[FORWARD, index] = self._recorder.phase = Phase()
            passed.append((received, self._forward(chunk, batch, received)))
            self._recorder.phase = Phase()
        for index in reversed(range(len(self._chunks))):
            gradient = None if unwrap(self._chunks[index]).post_process else self._hidden()
            phases[BACKWARD, index] = self._recorder.phase = Phase()
            self._backward(self._chunks[index], *passed.pop(), gradient)
            self._recorder.phase = Phase()

    def _forward(self, chunk: Any, batch: Batch, received: Tensor | None) -> Tensor:
        ends, groups = unwrap(chunk).post_process, self._plan.groups
        with self._recorder.saving():
            output = pipeline.forward_chunk(chunk, batch, self._plan.loss, received, ends=ends, groups=groups)
        if self.frees_outputs and not ends:
            pipeline.release_output(output, chunk)
        elif not ends:
            self._leave(output)
        return output

    def _backward(self, chunk: Any, received: Tensor | None, output: Tensor, gradient: Tensor | None) -> None:
        if (made := pipeline.backward_chunk(chunk, received, output, gradient)) is not None:
            self._leave(made)

    def _leave(self, made: Tensor) -> None:
        """The schedule gets what a pass has made."""
        if (number := self._recorder.number(made)) is not None:
            self._recorder.phase.output = number
            self._set_outside([number], "")

    def _set_outside(self, numbers: Iterable[int], kind: str) -> None:
        self.outside.update(numbers)
        for number in numbers:
            self._recorder.blocks[number].kind = kind

    def _batch(self) -> Batch:
        batch = {
            name: (torch.ones if name == "loss_mask" else torch.zeros)(shape, dtype=dtype)
            for name, (shape, dtype) in self._fields.items()
        }
        return pretrain.local_batch(batch, self._plan)

    def _hidden(self) -> Tensor:
        """What one pipeline stage sends another, [S/(cp tp), B, H]."""
        groups, parallel = self._plan.groups, self._config.parallel
        length = self._config.model.seq_length // groups.cp.size()
        length //= groups.tp.size() if parallel.sequence_parallel else 1
        dtype = getattr(torch, self._config.precision.params_dtype)
        hidden = torch.empty(length, self._config.train.micro_batch_size, self._config.model.hidden_size, dtype=dtype)
        self.exchanged = self._recorder.number(hidden)
        if self.exchanged is not None:
            self._set_outside([self.exchanged], COMMUNICATION)
        return hidden


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
