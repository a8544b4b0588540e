"""What the schedule itself holds: what was received, what was sent, and the gradients of both. Arithmetic, no torch.

Core's schedules keep these in variables and lists of their own, often beyond the pass that they belong to. Followed
here name by name for core 0.16.1 (``pipeline_parallel/schedules.py``): 1F1B with batched exchanges, interleaved 1F1B
with overlapped ones. All of them have one size, so that their number is enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable

from megatron_slm.memory.schedule import BACKWARD, FORWARD, UPDATE, Turn, forward_order, turns, warm_up


class Buffer:
    """One tensor of a schedule.

    Attributes:
        size: 1 for [S/(cp tp), B, H]; 0 for a loss, and for an output whose memory was given back.
        kept: live at least as long: the gradient of an input, the input that the graph of an output leads to.
    """

    def __init__(self, size: int, *kept: Buffer | None) -> None:
        self.size, self.kept, self.references = size, [one for one in kept if one is not None], 0


class Names:
    """What refers to buffers; ``alive`` counts those that exist and have a size."""

    def __init__(self) -> None:
        self.alive = 0
        self._named: dict[Hashable, Buffer] = {}

    def set(self, name: Hashable, buffer: Buffer | None) -> None:
        """Let ``name`` refer to another buffer, or to none."""
        before = self._named.pop(name, None)
        if buffer is not None:
            self.hold(buffer)
            self._named[name] = buffer
        self.drop(before)

    def get(self, name: Hashable) -> Buffer | None:
        """What ``name`` refers to."""
        return self._named.get(name)

    def hold(self, buffer: Buffer | None) -> None:
        """One more place refers to it."""
        if buffer is not None:
            buffer.references += 1
            if buffer.references == 1:
                self.alive += buffer.size
                for one in buffer.kept:
                    self.hold(one)

    def drop(self, buffer: Buffer | None) -> None:
        """One place fewer."""
        if buffer is not None:
            buffer.references -= 1
            if buffer.references == 0:
                self.alive -= buffer.size
                for one in buffer.kept:
                    self.drop(one)

    def free(self, buffer: Buffer | None) -> None:
        """Give its memory back, whoever refers to it."""
        if buffer is not None:
            self.alive -= buffer.size
            buffer.size = 0

    def differentiate(self, buffer: Buffer | None) -> Buffer | None:
        """The gradient of an input, made now."""
        if buffer is None:
            return None
        gradient = Buffer(1)
        buffer.kept.append(gradient)
        self.hold(gradient)
        return gradient


def held(pipeline_rank: int, stages: int, chunks: int, micro_batches: int, *, frees_outputs: bool) -> list[int]:
    """Buffers alive during every one of ``turns``, not counting the one that the turn itself makes.

    Args:
        frees_outputs: the schedule gives back an output's memory once it is sent (on GPUs).
    """
    order = turns(pipeline_rank, stages, chunks, micro_batches)
    if stages == 1:
        return [0] * len(order)
    kind = _OneForwardOneBackward if chunks == 1 else _Interleaved
    schedule = kind(pipeline_rank, stages, chunks, micro_batches, frees_outputs=frees_outputs)
    return [schedule.during(turn) for turn in order]


MODEL, INPUT, OUTPUT, INPUT_GRADIENT, OUTPUT_GRADIENT = (
    "model.input_tensor",
    "input_tensor",
    "output_tensor",
    "input_tensor_grad",
    "output_tensor_grad",
)
POPPED = ("popped input", "popped output", "popped gradient")
SENT, BACKWARD_BUFFER = "forward_output_tensor", "bwd_recv_buffer"


class _Schedule(ABC):
    """Variables and lists of one schedule of core."""

    def __init__(self, rank: int, stages: int, chunks: int, micro_batches: int, *, frees_outputs: bool) -> None:
        self.first, self.last = rank == 0, rank == stages - 1
        self.stages, self.chunks, self.frees_outputs = stages, chunks, frees_outputs
        self.ahead = warm_up(rank, stages, chunks, micro_batches)
        self.names = Names()
        self.inputs: list[deque[Buffer | None]] = [deque() for _ in range(chunks)]
        self.outputs: list[deque[Buffer | None]] = [deque() for _ in range(chunks)]
        self.gradients: list[deque[Buffer | None]] = [deque() for _ in range(chunks)]
        for chunk in range(self.first, chunks):  # what the step before has left
            self.names.set((MODEL, chunk), Buffer(1))
            self.names.differentiate(self.names.get((MODEL, chunk)))

    def during(self, turn: Turn) -> int:
        """Play one turn; buffers that are alive in it."""
        if turn.name == FORWARD:
            return self.forward(turn.chunk)
        if turn.name == BACKWARD:
            return self.backward(turn.chunk)
        if turn.name == UPDATE:
            self.end()
        return self.names.alive

    @abstractmethod
    def forward(self, chunk: int) -> int:
        """Buffers during a forward pass."""

    @abstractmethod
    def backward(self, chunk: int) -> int:
        """Buffers during a backward pass."""

    def end(self) -> None:
        """The schedule returns: what the chunks were given last is left."""
        for name in (INPUT, OUTPUT, INPUT_GRADIENT, OUTPUT_GRADIENT, BACKWARD_BUFFER):
            self.names.set(name, None)

    def put(self, queue: deque[Buffer | None], buffer: Buffer | None) -> None:
        """Append to a list of the schedule."""
        self.names.hold(buffer)
        queue.append(buffer)

    def take(self, name: str, queue: deque[Buffer | None]) -> Buffer | None:
        """Take the first of a list under a name."""
        buffer = queue.popleft()
        self.names.set(name, buffer)
        self.names.drop(buffer)
        return buffer


class _OneForwardOneBackward(_Schedule):
    """``forward_backward_pipelining_without_interleaving``."""

    def forward(self, chunk: int) -> int:
        """Receive, run, send."""
        names = self.names
        received = None if self.first else Buffer(1)
        names.set(INPUT, received)
        names.set((MODEL, chunk), received)
        alive = names.alive
        names.set(OUTPUT, Buffer(0 if self.last or self.frees_outputs else 1, received))
        self.put(self.inputs[chunk], received)
        self.put(self.outputs[chunk], names.get(OUTPUT))
        return alive

    def backward(self, chunk: int) -> int:
        """Receive, run, send."""
        names = self.names
        names.set(OUTPUT_GRADIENT, None if self.last else Buffer(1))
        received = self.take(INPUT, self.inputs[chunk])
        self.take(OUTPUT, self.outputs[chunk])
        alive = names.alive
        names.set(INPUT_GRADIENT, names.differentiate(received))
        return alive


class _Interleaved(_Schedule):
    """``forward_backward_pipelining_with_interleaving``."""

    def __init__(self, rank: int, stages: int, chunks: int, micro_batches: int, *, frees_outputs: bool) -> None:
        super().__init__(rank, stages, chunks, micro_batches, frees_outputs=frees_outputs)
        self.order = [chunk for _, chunk in forward_order(stages, chunks, micro_batches)]
        self.forwards = self.backwards = 0
        self.put(self.inputs[0], None if self.first else Buffer(1))

    def forward(self, chunk: int) -> int:
        """Run a micro-batch whose input has been received; send, and receive what a later one needs."""
        names, is_ahead = self.names, self.forwards < self.ahead
        inputs, outputs = self.inputs[chunk], self.outputs[chunk]
        if self.first and chunk == 0 and len(inputs) == len(outputs):
            self.put(inputs, None)
        if self.frees_outputs and not is_ahead:
            names.free(names.get(OUTPUT))
        received = inputs[len(outputs)]
        names.set((MODEL, chunk), received)
        alive = names.alive
        ends = self.last and chunk == self.chunks - 1
        output = Buffer(0 if ends or (self.frees_outputs and is_ahead) else 1, received)
        self.put(outputs, output)
        names.set(OUTPUT if is_ahead else SENT, None if ends else output)
        expected, target = self._expects(self.forwards, forward=True)
        self.forwards += 1
        following = Buffer(1) if expected and self.forwards < len(self.order) else None
        if following is not None:
            self.put(self.inputs[target], following)
        if is_ahead:
            names.set(INPUT, following)
            if self.forwards == self.ahead < len(self.order) and not self.last:
                names.set(BACKWARD_BUFFER, Buffer(1))
                self.put(self.gradients[-1], names.get(BACKWARD_BUFFER))
        return alive

    def backward(self, chunk: int) -> int:
        """Run a micro-batch whose gradient has been received; send, and receive what a later one needs."""
        names, is_after = self.names, self.backwards >= len(self.order) - self.ahead
        if is_after:
            self._begin_cool_down()
        if self.last and chunk == self.chunks - 1 and not self.gradients[chunk]:
            self.put(self.gradients[chunk], None)
        queues = (self.inputs[chunk], self.outputs[chunk], self.gradients[chunk])
        received, *_ = [self.take(name, queue) for name, queue in zip(POPPED, queues, strict=True)]
        alive = names.alive
        made = names.differentiate(received)
        expected, target = self._expects(self.backwards, forward=False)
        self.backwards += 1
        following = Buffer(1) if expected and not (is_after and self.backwards == len(self.order)) else None
        if following is not None:
            self.put(self.gradients[target], following)
        names.set(INPUT_GRADIENT, made)
        for name in POPPED:
            names.set(name, None)
        if is_after:
            names.set(OUTPUT_GRADIENT, following)
        else:
            names.set(BACKWARD_BUFFER, None)
            names.set(OUTPUT, names.get(SENT))
            names.set(SENT, None)
        return alive

    def _begin_cool_down(self) -> None:
        if self.frees_outputs:
            self.names.free(self.names.get(OUTPUT))
        if self.backwards == 0:
            self.put(self.gradients[-1], None if self.last else Buffer(1))

    def _expects(self, k: int, *, forward: bool) -> tuple[bool, int]:
        """``recv_tensor_from_previous_stage``: whether something comes after pass ``k``, and for which chunk."""
        if not (self.first if forward else self.last):
            return True, self._chunk(k + 1, forward)
        ahead = self.stages - 1
        if k < ahead:
            return False, 0
        sender = self._chunk(k - ahead, forward)
        return sender != (self.chunks - 1 if forward else 0), sender + (1 if forward else -1)

    def _chunk(self, k: int, forward: bool) -> int:
        chunk = self.order[k % len(self.order)]
        return chunk if forward else self.chunks - 1 - chunk
