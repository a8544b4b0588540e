"""The record of one step in ``metrics.jsonl``: what it holds, how it is computed, and how a resume cuts the file."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.train.hook import StepResult
from megatron_slm.train.peak_flops import peak_flops

LM_LOSS = "lm loss"
"""Megatron's name of the cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Turns tokens and seconds into rates.

    FLOPs are model FLOPs (``model.counts.flops_per_token``): what the model needs, without recomputation, whatever the
    device really executes. Utilisation is known only for a device with a published peak.
    """

    flops_per_token: float
    world_size: int
    peak_flops_per_rank: float | None = None

    @classmethod
    def of(cls, flops_per_token: float, world_size: int, *, device_name: str, params_dtype: str) -> Throughput:
        """For ranks on devices that report ``device_name``."""
        peak = peak_flops(device_name, params_dtype)
        return cls(flops_per_token=flops_per_token, world_size=world_size, peak_flops_per_rank=peak)

    def tflops_per_second(self, tokens: float, seconds: float) -> float:
        """Model TFLOP/s of one rank, for ``tokens`` of the whole job."""
        return tokens * self.flops_per_token / (max(seconds, 1e-9) * self.world_size * 1e12)

    def utilisation(self, tokens: float, seconds: float) -> float | None:
        """Model FLOPs utilisation, 0 to 1 (arXiv 2204.02311, appendix B), or None without a known peak."""
        if self.peak_flops_per_rank is None:
            return None
        return self.tflops_per_second(tokens, seconds) * 1e12 / self.peak_flops_per_rank


def step_record(
    result: StepResult, *, seq_length: int, throughput: Throughput, memory_bytes: int, loss_name: str = LM_LOSS
) -> dict[str, Any]:
    """One object of ``metrics.jsonl``. A number that is not finite is null; ``lm_loss_bits`` still tells which.

    Stages that minimise something else have ``loss`` and ``loss_bits``; ``loss_tokens`` is what their loss is the mean
    over: tokens, pairs or sequences.

    Keys with a unit bear it as suffix. ``tokens`` are all of this step, ``loss_tokens`` those that count in the loss.
    Rates are over ``step_ms``, so without the pause before the step (``checkpoint_ms``: saving, validating, logging).
    ``tflops_per_second``, ``mfu`` and ``memory_bytes`` are those of the rank that writes.
    """
    tokens, times, loss_key = result.batch_size * seq_length, result.times, loss_name.replace(" ", "_")
    return {
        "step": result.step,
        "consumed_samples": result.consumed_samples,
        "consumed_tokens": result.consumed_tokens,
        "tokens": tokens,
        "loss_tokens": result.num_tokens,
        loss_key: finite(result.loss),
        f"{loss_key}_bits": float(result.loss).hex(),
        "grad_norm": finite(result.grad_norm),
        "learning_rate": result.learning_rate,
        "batch_size": result.batch_size,
        "skipped": result.skipped,
        "skipped_samples": result.skipped_samples,
        **{name.replace(" ", "_"): finite(value) for name, value in result.extra.items()},
        "tokens_per_second": tokens / max(times.total, 1e-9),
        "tflops_per_second": throughput.tflops_per_second(tokens, times.total),
        "mfu": throughput.utilisation(tokens, times.total),
        "memory_bytes": memory_bytes,
        "step_ms": 1e3 * times.total,
        "data_ms": 1e3 * times.data,
        "forward_backward_ms": 1e3 * times.forward_backward,
        "optimizer_ms": 1e3 * times.optimizer,
        "checkpoint_ms": 1e3 * times.checkpoint,
        "sample_digest": result.sample_digest,
    }


def finite(value: float) -> float | None:
    """The value, or ``None`` where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None


def truncate_records(path: Path, last_step: int) -> None:
    """Cut every record after ``last_step``, and a torn last line, from a file of ascending records.

    A resume makes these steps again. The file is read from its end, so the cost is that of what is cut.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data)
            while end > 0:
                start = data.rfind(b"\n", 0, end - 1) + 1
                step = _step_of(data[start:end])
                if step is not None and step <= last_step:
                    break
                end = start
        file.truncate(end)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a ``metrics.jsonl`` or ``validation.jsonl``, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, or ``None`` for one that a crash has torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
