"""Names a rank that is slower than its peers while the job still goes on. A hook of every rank.

Ranks that exchange in every layer take equally long for a step, whoever is slow: the others wait. So what tells them
apart is how much of its time a rank does *not* wait. A thread samples where the training thread stands (``place.py``),
as a sampling profiler does; on a GPU, where the host runs ahead of its device, a fixed product is timed instead. Both
are compared among the ranks of one pipeline stage, which have the same work.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_slm.survival.place import Known, waits
from megatron_slm.train.hook import Hook, StepResult

RATIO = 2.0
"""A rank is named from so many times its peers' median on."""
IN_A_ROW = 2
"""Measurements in a row that must say so."""
_SAMPLE_S = 0.01
_PRODUCT, _REPEATS = 512, 3
_LEAST_SAMPLES = 20


class Measured(NamedTuple):
    """What one rank was busy with since the last measurement, a step on average.

    Attributes:
        busy_ms: on a CPU, outside of exchanges with others; on a GPU of a fixed matrix product, the least of three.
        data_ms: reading data; on a CPU part of ``busy_ms``.
    """

    busy_ms: float
    data_ms: float


class Slow(NamedTuple):
    """A rank that is slower than its peers: so many times, and in what."""

    rank: int
    ratio: float
    why: str


class Straggler(Hook):
    """See the module.

    Args:
        interval: steps between measurements; each costs an exchange of two numbers, and on a GPU some milliseconds.
        peers: of every rank, the ranks that have the same work, itself among them.
        warn: writes a line into the run's log; nothing on ranks without one.
        write: adds values to the step's record.
    """

    def __init__(
        self,
        interval: int,
        *,
        device: torch.device,
        peers: Sequence[Sequence[int]],
        warn: Callable[[str], None],
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self._interval, self._device, self._peers = interval, device, peers
        self._warn, self._write = warn, write
        self._sampler = Sampler()
        self._data_s, self._steps, self._since_s = 0.0, 0, time.perf_counter()
        self._suspected: dict[int, int] = {}

    def before_run(self, state: Any) -> None:
        """Begin to sample."""
        self._sampler.start()
        self._since_s = time.perf_counter()

    def after_step(self, state: Any, result: StepResult) -> None:
        """Measure at the interval. Collective."""
        self._data_s += result.times.data
        self._steps += 1
        if result.step % self._interval == 0:
            self._judge(self._gathered(self._measured()))

    def rewind(self, state: Any) -> None:
        self._suspected = {}

    def after_run(self, state: Any, code: int) -> None:
        self._sampler.stop()

    def on_error(self, state: Any, error: Any) -> None:
        self._sampler.stop()

    def _measured(self) -> Measured:
        a_step = 1e3 / max(1, self._steps)
        on_cpu = self._device.type == "cpu"
        passed_s = time.perf_counter() - self._since_s
        busy_ms = (1.0 - self._sampler.take()) * passed_s * a_step if on_cpu else product_ms(self._device)
        found = Measured(busy_ms, self._data_s * a_step)
        self._data_s, self._steps, self._since_s = 0.0, 0, time.perf_counter()
        return found

    def _gathered(self, own: Measured) -> list[Measured]:
        values = torch.tensor(own, dtype=torch.float32, device=self._device)
        everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, values)
        return [Measured(*one.tolist()) for one in everyone]

    def _judge(self, measured: Sequence[Measured]) -> None:
        what = "what it does between exchanges" if self._device.type == "cpu" else "a fixed matrix product"
        found = slow_ranks(measured, self._peers, what)
        before, self._suspected = self._suspected, {}
        for one in found:
            self._suspected[one.rank] = before.get(one.rank, 0) + 1
            if self._suspected[one.rank] == IN_A_ROW:
                self._warn(
                    f"rank {one.rank} is a straggler: {one.ratio:.1f} times as slow as its peers in {one.why}; the "
                    "others wait for it. Look at its machine (other processes, clocks, throttling: mslm doctor)."
                )
        worst = max(found, key=lambda one: one.ratio, default=None)
        if worst is not None:
            self._write({"straggler": {"rank": worst.rank, "ratio": worst.ratio, "in": worst.why}})


def slow_ranks(
    measured: Sequence[Measured], peers: Sequence[Sequence[int]], what: str, *, ratio: float = RATIO
) -> list[Slow]:
    """Ranks that are at least ``ratio`` times as slow as the median of their peers.

    Args:
        measured: of every rank.
        peers: of every rank; one without a peer is compared with all others.
        what: ``busy_ms`` is of.
    """
    found = []
    for rank, own in enumerate(measured):
        others = [other for other in peers[rank] if other != rank] or [
            other for other in range(len(measured)) if other != rank
        ]
        if not others:
            continue
        times = own.busy_ms / max(1e-9, median(measured[other].busy_ms for other in others))
        if times >= ratio:
            found.append(Slow(rank, times, _where(own, measured, others, what)))
    return found


def _where(own: Measured, measured: Sequence[Measured], others: Sequence[int], what: str) -> str:
    """Adds that most of what is too long is spent on reading data, where it is."""
    usual = median(measured[other].data_ms for other in others)
    too_long = own.busy_ms - median(measured[other].busy_ms for other in others)
    return f"{what}, above all in reading data" if own.data_ms - usual > 0.5 * too_long > 0.0 else what


def product_ms(device: torch.device) -> float:
    """Milliseconds of a fixed product of two matrices, the least of three."""
    one = torch.full((_PRODUCT, _PRODUCT), 0.5, device=device)
    least = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        product = one @ one
        product[0, 0].item()  # waits for a device
        least = min(least, time.perf_counter() - started)
    return 1e3 * least


class Sampler:
    """Looks every 10 ms whether the training thread waits for other ranks."""

    def __init__(self) -> None:
        self._known: Known = {}
        self._waiting, self._looks = 0, 0
        self._ended = threading.Event()

    def start(self) -> None:
        """Sample this thread from now on."""
        watched = threading.get_ident()
        threading.Thread(target=self._sample, args=(watched,), name="straggler", daemon=True).start()

    def stop(self) -> None:
        """Sample no more."""
        self._ended.set()

    def take(self) -> float:
        """Share of the time since the last call in which the thread has waited; 0 where that is too short to say."""
        waiting, looks = self._waiting, self._looks
        self._waiting, self._looks = 0, 0
        return waiting / looks if looks >= _LEAST_SAMPLES else 0.0

    def _sample(self, watched: int) -> None:
        while not self._ended.wait(_SAMPLE_S):
            frame = sys._current_frames().get(watched)
            if frame is None:
                return
            self._looks += 1
            self._waiting += waits(frame, self._known)
            # Held until the next look, it would keep alive what its function has let go of.
            del frame
