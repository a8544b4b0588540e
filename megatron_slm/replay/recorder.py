"""The hook that writes a run's fingerprints: what each step read, computed and left, tensor by tensor, on every rank.

It exchanges nothing and changes nothing: no random number is drawn, no value written. Digests are computed where the
tensors are, at the moment when they hold what is meant, and fetched once at the end of the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron_slm.errors import UserError
from megatron_slm.parallel.gradients import before_reduction
from megatron_slm.replay import batches, places
from megatron_slm.replay.config import ReplayConfig
from megatron_slm.replay.modules import Listener
from megatron_slm.replay.operations import Operations
from megatron_slm.replay.page import Page
from megatron_slm.replay.stream import Flag, Phase, StreamWriter, ranks_in
from megatron_slm.replay.tensors import Held, Named
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import StepInput, TrainState


class Recorder(Hook):
    """Records every ``every``-th step into ``folder``.

    It comes after any hook that runs passes of its own in ``before_forward``, and before the one that saves
    checkpoints: a step that a resume will not make again is recorded.
    """

    def __init__(self, config: ReplayConfig, folder: Path, *, rank: int, world_size: int) -> None:
        """Record nothing yet."""
        self._config, self._folder, self._rank, self._world_size = config, folder, rank, world_size
        self._op_steps = frozenset(map(int, config.op_steps)) if config.level == "op" else frozenset()
        self._page = Page()
        self._recording = contextlib.ExitStack()

    def before_run(self, state: TrainState) -> None:
        """Open the stream behind the step at which the run starts."""
        self._writer = StreamWriter(self._folder, self._rank, step=state.step)
        batches.forget_after(self._folder, self._rank, state.step)
        if self._rank == 0:
            for gone in ranks_in(self._folder):
                if gone >= self._world_size:  # of a start on more ranks than these
                    StreamWriter(self._folder, gone, step=state.step).close()
        self._begin(state)

    def before_forward(self, state: TrainState, inputs: StepInput) -> None:
        """Note the batch and the random states, and begin to listen."""
        self._drop()
        if (state.step + 1) % self._config.every:
            return
        if self._config.keep_batches:
            batches.keep(
                self._folder,
                self._rank,
                state.step + 1,
                inputs,
                newest=self._config.keep_batches,
            )
        self._note_batch(inputs)
        self._note_random(state)
        self._page.open = True
        self._listener.start()
        self._recording.callback(self._listener.stop)
        self._recording.enter_context(before_reduction(state.chunks, self._note_local_gradients))
        if state.step + 1 in self._op_steps:
            file = places.path_of(self._folder, state.step + 1, self._rank)
            self._recording.enter_context(Operations(self._note_operation, file))

    def after_backward(self, state: TrainState, inputs: StepInput) -> None:
        """Listen no more."""
        self._recording.close()

    def before_update(self, state: TrainState, inputs: StepInput) -> None:
        """Note the reduced gradients."""
        if self._page.open:
            self._note_all(Phase.GRADIENT, self._held.gradients())

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Note what the step has left, and write it."""
        if not self._page.open:
            return
        if not result.skipped:
            self._page.note_held(Phase.OPTIMIZER, self._held.optimizer)
        self._page.note_held(Phase.PARAMETER, self._held.parameters)
        self._page.note_value(Phase.STEP, "loss", (_bits(result.loss), result.num_tokens))
        self._page.note_value(Phase.STEP, "grad_norm", (_bits(result.grad_norm), _bits(result.learning_rate)))
        self._page.note_value(Phase.STEP, "consumed", (result.consumed_samples, result.consumed_tokens))
        self._page.write(self._writer, result.step, Flag.SKIPPED if result.skipped else 0)
        keep = self._config.keep_steps
        if keep is not None and self._writer.whole_frames >= 2 * keep:
            self._writer.thin(keep)

    def rewind(self, state: TrainState) -> None:
        """Forget what will be made again; the optimizer's tensors are others now."""
        self._drop()
        self._writer.rewind(state.step)
        batches.forget_after(self._folder, self._rank, state.step)
        self._begin(state)

    def on_error(self, state: TrainState, error: UserError) -> None:
        """Write what there is of the step that ended the run."""
        self._recording.close()
        if self._page.open and hasattr(self, "_writer"):
            with contextlib.suppress(OSError):
                self._page.write(self._writer, state.step + 1, Flag.UNFINISHED)

    def after_run(self, state: TrainState, code: int) -> None:
        """Close the stream."""
        self._drop()
        self._writer.close()

    def _begin(self, state: TrainState) -> None:
        """Find the tensors, and write what they hold before the first step."""
        self._page.forget_held()
        self._held = Held(state.chunks, state.optimizer)
        self._listener = Listener(state.chunks, self._page, layers=self._config.level != "light")
        self._note_random(state)
        self._note_all(Phase.OPTIMIZER, self._held.optimizer)
        self._note_all(Phase.PARAMETER, self._held.parameters)
        self._page.write(self._writer, state.step, Flag.START)

    def _drop(self) -> None:
        self._recording.close()
        self._page.clear()

    def _note_batch(self, inputs: StepInput) -> None:
        # Of all samples so far, in global order: the same on every rank and under every layout.
        chain = hashlib.blake2b(inputs.cursor.rolling_digest.encode(), digest_size=16).digest()
        self._page.note_value(Phase.BATCH, "sample_ids", struct.unpack("<QQ", chain))
        for number, batch in enumerate(inputs.micro_batches):
            self._page.note_soon(Phase.BATCH, number, list(batch), list(batch.values()))

    def _note_random(self, state: TrainState) -> None:
        for name, value in _tensors("", state.random.capture()):
            self._page.note_soon(Phase.RNG, 0, [name], [value])

    def _note_local_gradients(self, params: list[nn.Parameter]) -> None:
        self._page.note_held(Phase.LOCAL_GRADIENT, self._held.local_gradients(params))

    def _note_all(self, phase: Phase, named: Named) -> None:
        self._page.note(phase, 0, named.names, named.tensors)

    def _note_operation(self, name: str, tensors: list[Tensor]) -> bool:
        if self._page.busy:
            return False
        self._page.note(Phase.OPERATION, 0, [f"{name}[{index}]" for index in range(len(tensors))], tensors)
        return True


def _tensors(name: str, states: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of everything in nested random states."""
    if isinstance(states, Tensor):
        yield name, states
    elif isinstance(states, dict):
        for key, value in states.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), value)


def _bits(value: float) -> int:
    """The 64 bits of a float."""
    bits: int = struct.unpack("<Q", struct.pack("<d", value))[0]
    return bits
