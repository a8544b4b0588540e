"""What a run says: Megatron's lines on standard output and in ``log.txt``, a progress bar, and ``progress.txt``.

People's scripts search logs for these words, so their spelling and order are those of Megatron's ``training_log``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from megatron_slm.train.hook import StepResult


class Console:
    """Writes lines to standard output and to ``log.txt`` of the run, above a progress bar where there is a terminal."""

    def __init__(self, log: Path, *, train_iters: int, step: int, progress_bar: bool) -> None:
        """Append to ``log``; the bar starts at ``step`` of ``train_iters``."""
        self._log = log.open("a", encoding="utf-8", buffering=1)
        shown = progress_bar and sys.stderr.isatty()
        self._bar = tqdm(total=train_iters, initial=step, unit="it", dynamic_ncols=True) if shown else None

    def say(self, line: str) -> None:
        """Print one line and keep it."""
        self._log.write(line + "\n")
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)

    def keep(self, line: str) -> None:
        """Keep one line without printing it: somebody else says it."""
        self._log.write(line + "\n")

    def advance(self, *, loss: float, tokens_per_second: float) -> None:
        """One step more on the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def rewind(self, step: int) -> None:
        """Set the bar back to ``step``."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands and close the file."""
        if self._bar is not None:
            self._bar.close()
        self._log.close()


def iteration_line(
    results: Sequence[StepResult],
    *,
    train_iters: int,
    tflops_per_second: float,
    now: datetime,
    loss_name: str = "lm loss",
) -> str:
    """Megatron's line for the steps since the last one, oldest first.

    Loss and time are means over these steps, as there; norm, learning rate and batch size are the last step's. The
    learning rate is the one the update was made with, where Megatron prints that of the next update.

    Args:
        results: at least one step.
        train_iters: updates of the whole run.
        tflops_per_second: of one rank, mean over these steps.
        now: the time to print.
    """
    assert results, "a line needs at least one step"
    last = results[-1]
    applied = [result for result in results if not result.skipped]
    finite = [result.loss for result in applied if math.isfinite(result.loss)]
    milliseconds = 1e3 * sum(result.times.total for result in results) / len(results)
    line = f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {last.step:8d}/{train_iters:8d} |"
    line += f" consumed samples: {last.consumed_samples:12d} |"
    if last.skipped_samples:
        line += f" skipped samples: {last.skipped_samples:12d} |"
    line += f" elapsed time per iteration (ms): {milliseconds:.1f} |"
    # One decimal is Megatron's; a CPU rank would read 0.0 with it.
    line += f" throughput per GPU (TFLOP/s/GPU): {tflops_per_second:.{1 if tflops_per_second >= 1 else 4}f} |"
    line += f" learning rate: {last.learning_rate:.6E} |"
    line += f" global batch size: {last.batch_size:5d} |"
    if finite:
        line += f" {loss_name}: {sum(finite) / len(finite):.6E} |"
    line += f" loss scale: {1.0:.1f} | grad norm: {last.grad_norm:.3f} |"
    line += f" number of skipped iterations: {len(results) - len(applied):3d} |"
    nan = sum(not math.isfinite(result.loss) for result in results)
    return line + f" number of nan iterations: {nan:3d} |"


def validation_lines(loss: float, *, where: str, loss_name: str = "lm loss") -> list[str]:
    """Megatron's framed lines for a validation; ``where`` is for example ``iteration 100``."""
    line = f" validation loss at {where} | {loss_name} value: {loss:.6E} | "
    if loss_name == "lm loss":
        line += f"{loss_name} PPL: {capped_perplexity(loss):.6E} | "
    frame = "-" * (len(line) + 1)
    return [frame, line, frame]


def capped_perplexity(loss: float) -> float:
    """exp(loss) with the exponent cut at 20, as Megatron reports it."""
    return math.exp(min(20.0, loss)) if not math.isnan(loss) else math.nan


def append_progress(progress: Path, event: str, *, world_size: int, now: datetime) -> None:
    """Add one line to the file ``progress``: what happened to the run, over all its restarts."""
    job = os.environ.get("SLURM_JOB_ID", "")
    with progress.open("a", encoding="utf-8") as file:
        file.write(f"{now:%Y-%m-%d %H:%M:%S}\tJob ID: {job}\t# GPUs: {world_size}\t{event}\n")


def restarts_text(environ: Mapping[str, str]) -> str:
    """How often Slurm or torchrun has started this job again, for ``progress.txt``; empty for the first time."""
    count = environ.get("SLURM_RESTART_COUNT") or environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    return "" if count == "0" else f"\tRestart: {count}"
