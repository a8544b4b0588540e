"""Power, energy, clocks, temperature and errors of every rank's GPU, with each line of the log. A hook of every rank.

Each rank reads its own GPU (``nvml.py``); one exchange of a few numbers brings them to the rank that writes the log.
Its record shows sums and the worst rank; ``telemetry.jsonl`` of the run keeps the numbers of each.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_slm.train import nvml
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.metrics import finite, truncate_records
from megatron_slm.train.nvml import Reading

FILE = "telemetry.jsonl"
_NAMED = 8
"""Ranks that a sentence names; of more it says how many."""


class Sample(NamedTuple):
    """What one rank tells: its reading, and what has passed since the one before. ``nvml.UNKNOWN`` is not known."""

    power_watts: float
    energy_joules: float
    celsius: float
    utilisation: float
    sm_clock_mhz: float
    memory_clock_mhz: float
    throttle_bits: float
    ecc_corrected: float
    ecc_uncorrected: float
    nvlink_bytes_per_second: float
    nvlink_errors: float
    pcie_bytes_per_second: float


def sample_between(before: Reading, now: Reading) -> Sample:
    """What a rank tells after two readings of its GPU.

    Energy is the difference of the driver's counter; of a GPU without one, the mean of both powers over the time.
    """
    seconds = max(1e-9, now.seconds - before.seconds)
    energy = now.energy_joules - before.energy_joules
    if math.isnan(energy):
        energy = 0.5 * (before.power_watts + now.power_watts) * seconds
    return Sample(
        power_watts=now.power_watts,
        energy_joules=energy,
        celsius=now.celsius,
        utilisation=now.utilisation,
        sm_clock_mhz=now.sm_clock_mhz,
        memory_clock_mhz=now.memory_clock_mhz,
        throttle_bits=now.throttle_bits,
        ecc_corrected=now.ecc_corrected,
        ecc_uncorrected=now.ecc_uncorrected,
        nvlink_bytes_per_second=(now.nvlink_bytes - before.nvlink_bytes) / seconds,
        nvlink_errors=now.nvlink_errors,
        pcie_bytes_per_second=(now.pcie_bytes - before.pcie_bytes) / seconds,
    )


class Telemetry(Hook):
    """See the module.

    Args:
        interval: steps between readings.
        last_step: of the run; it is read after that one too.
        device: of this rank.
        directory: of the run.
        tell: what the rank that writes the log does with it; None on every other rank.
    """

    def __init__(
        self, interval: int, last_step: int, *, device: torch.device, directory: Path, tell: Teller | None
    ) -> None:
        self._interval, self._last_step, self._device, self._tell = interval, last_step, device, tell
        self._path = directory / FILE
        self._nvml: Any = None
        self._handle: Any = None
        self._hosts: list[str] = []
        self._any = False
        self._warned: set[tuple[int, str]] = set()
        self._before = Reading()
        self._step, self._tokens = 0, 0

    def before_run(self, state: Any) -> None:
        """Open the GPUs, and say once where there are none. Collective."""
        host = socket.gethostname()
        self._nvml, missing = nvml.opened()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, host)
        self._hosts = list(everyone)
        if self._nvml is not None:
            index = self._hosts[: dist.get_rank()].count(host)
            self._handle = nvml.handle_of(self._nvml, uuid=_uuid(self._device), index=index)
            missing = "" if self._handle is not None else "the driver has no GPU for it"
        dist.all_gather_object(everyone, missing)
        self._any = "" in everyone
        if self._tell is not None:
            if self._path.exists():
                truncate_records(self._path, state.step)
            if any(everyone):
                self._tell.say(missing_text(everyone, self._hosts))
        self._begin(state.step, state.cursor.consumed_samples * state.cursor.seq_length)

    def after_step(self, state: Any, result: StepResult) -> None:
        """Read at the interval and at the end. Collective."""
        if not self._any or (result.step % self._interval and result.step != self._last_step):
            return
        now = self._read()
        samples = self._gathered(sample_between(self._before, now))
        steps, tokens = result.step - self._step, result.consumed_tokens - self._tokens
        self._begin(result.step, result.consumed_tokens, now)
        if self._tell is None:
            return
        shown = summary(samples, steps=steps, tokens=tokens)
        self._tell.write({"telemetry": shown}, line(shown, samples, self._hosts))
        self._keep(result.step, samples)
        for warning in self._warnings(samples):
            self._tell.warn(warning)

    def rewind(self, state: Any) -> None:
        if self._tell is not None and self._path.exists():
            truncate_records(self._path, state.step)
        self._begin(state.step, state.cursor.consumed_samples * state.cursor.seq_length)

    def after_run(self, state: Any, code: int) -> None:
        self._close()

    def on_error(self, state: Any, error: Any) -> None:
        self._close()

    def _begin(self, step: int, tokens: int, reading: Reading | None = None) -> None:
        self._before, self._step, self._tokens = reading or self._read(), step, tokens

    def _read(self) -> Reading:
        return Reading() if self._handle is None else nvml.read(self._nvml, self._handle)

    def _gathered(self, own: Sample) -> list[Sample]:
        values = torch.tensor(own, dtype=torch.float64, device=self._device)
        everyone = [torch.empty_like(values) for _ in self._hosts]
        dist.all_gather(everyone, values)
        return [Sample(*one.tolist()) for one in everyone]

    def _keep(self, step: int, samples: Sequence[Sample]) -> None:
        ranks = [
            {
                "rank": rank,
                "host": self._hosts[rank],
                **{name: finite(value) for name, value in sample._asdict().items() if name != "throttle_bits"},
                "throttle": list(nvml.reasons(sample.throttle_bits)),
            }
            for rank, sample in enumerate(samples)
        ]
        # On a full disk the log stops the run with its own sentence, at this very step.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "ranks": ranks}) + "\n")

    def _warnings(self, samples: Sequence[Sample]) -> list[str]:
        """What has not been said yet of a rank: clocks that are held down, memory that has failed."""
        found: dict[str, list[int]] = {}
        for rank, sample in enumerate(samples):
            said = list(nvml.reasons(_harmful(sample.throttle_bits)))
            if sample.ecc_uncorrected > 0:
                said.append(f"{sample.ecc_uncorrected:.0f} uncorrected ECC errors")
            for what in said:
                if (rank, what) not in self._warned:
                    self._warned.add((rank, what))
                    found.setdefault(what, []).append(rank)
        return [warning_text(what, ranks, self._hosts) for what, ranks in found.items()]

    def _close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._handle = None, None


class Teller(NamedTuple):
    """The log as telemetry uses it.

    Attributes:
        say: a line of the log.
        warn: a line of the log that is a warning.
        write: values of the step's record, and what the console shows of them.
    """

    say: Callable[[str], None]
    warn: Callable[[str], None]
    write: Callable[[dict[str, Any], str], None]


def summary(samples: Sequence[Sample], *, steps: int, tokens: int) -> dict[str, Any]:
    """Sums over the ranks and the worst of them; None where no rank knows.

    Args:
        steps: since the readings before.
        tokens: of these steps.
    """
    energy = _sum(sample.energy_joules for sample in samples)
    hottest = _where(samples, "celsius", 1.0)
    slowest = _where(samples, "sm_clock_mhz", -1.0)
    bits = [int(_harmful(sample.throttle_bits)) for sample in samples]
    return {
        "ranks": sum(not math.isnan(sample.power_watts) for sample in samples),
        "power_watts": _sum(sample.power_watts for sample in samples),
        "joules_per_step": None if energy is None else energy / max(1, steps),
        "joules_per_token": None if energy is None else energy / max(1, tokens),
        "hottest_rank": hottest,
        "hottest_celsius": None if hottest is None else samples[hottest].celsius,
        "slowest_rank": slowest,
        "slowest_sm_clock_mhz": None if slowest is None else samples[slowest].sm_clock_mhz,
        "memory_clock_mhz": min(_known(sample.memory_clock_mhz for sample in samples), default=None),
        "least_utilisation": min(_known(sample.utilisation for sample in samples), default=None),
        "throttled_ranks": sum(bit != 0 for bit in bits),
        "throttle": dict(Counter(name for bit in bits for name in nvml.reasons(bit))),
        "ecc_corrected": _sum(sample.ecc_corrected for sample in samples),
        "ecc_uncorrected": _sum(sample.ecc_uncorrected for sample in samples),
        "nvlink_bytes_per_second": _sum(sample.nvlink_bytes_per_second for sample in samples),
        "nvlink_errors": _sum(sample.nvlink_errors for sample in samples),
        "pcie_bytes_per_second": _sum(sample.pcie_bytes_per_second for sample in samples),
    }


def line(shown: dict[str, Any], samples: Sequence[Sample], hosts: Sequence[str]) -> str:
    """What the console shows below a step's line: ``gpus: 2800 W | 0.0121 J/token | hottest 71 C (rank 3, n2)``."""
    parts = []
    if shown["power_watts"] is not None:
        parts.append(f"{shown['power_watts']:.0f} W")
    if shown["joules_per_token"] is not None:
        parts.append(f"{shown['joules_per_token']:.3g} J/token")
    if (rank := shown["hottest_rank"]) is not None:
        parts.append(f"hottest {samples[rank].celsius:.0f} C (rank {rank}, {hosts[rank]})")
    if (rank := shown["slowest_rank"]) is not None:
        parts.append(f"slowest {samples[rank].sm_clock_mhz:.0f} MHz (rank {rank}, {hosts[rank]})")
    parts += [f"{name} on {count} rank{'s' * (count > 1)}" for name, count in shown["throttle"].items()]
    return "gpus: " + " | ".join(parts)


def missing_text(missing: Sequence[str], hosts: Sequence[str]) -> str:
    """One line about the ranks whose GPU cannot be asked, and why."""
    without = [rank for rank, reason in enumerate(missing) if reason]
    why = "; ".join(dict.fromkeys(reason for reason in missing if reason))
    if len(without) == len(missing):
        return f"telemetry: no rank's GPU can be asked: {why}."
    return f"telemetry: the GPU of {_places(without, hosts)} cannot be asked: {why}."


def warning_text(what: str, ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """What to do about ranks whose GPUs are held down or have failed."""
    where = _places(ranks, hosts)
    if "ECC" in what:
        return f"{what} since the driver was loaded, on {where}: leave the node out and have the GPU reset or replaced."
    return (
        f"GPU clocks are held down ({what}) on {where}: every other rank waits for a slow one. Look at cooling and "
        "power limits there (nvidia-smi -q -d PERFORMANCE,POWER)."
    )


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks[:_NAMED])
    return named + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def _harmful(bits: float) -> float:
    return 0.0 if math.isnan(bits) else float(int(bits) & ~nvml.HARMLESS)


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _sum(values: Iterable[float]) -> float | None:
    known = _known(values)
    return sum(known) if known else None


def _where(samples: Sequence[Sample], name: str, sign: float) -> int | None:
    """The rank with the largest value, or with ``sign`` -1 the smallest."""
    ranks = [rank for rank, sample in enumerate(samples) if not math.isnan(getattr(sample, name))]
    return max(ranks, key=lambda rank: sign * getattr(samples[rank], name), default=None)


def _uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
