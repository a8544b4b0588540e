"""The hook that writes what a run leaves: console, ``log.txt``, ``progress.txt``, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

from megatron_slm.errors import LogError, UserError
from megatron_slm.train.config import LogConfig
from megatron_slm.train.console import (
    Console,
    append_progress,
    capped_perplexity,
    iteration_line,
    restarts_text,
    validation_lines,
)
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.memory_use import MemoryUse
from megatron_slm.train.metrics import LM_LOSS, Throughput, finite, read_records, step_record, truncate_records
from megatron_slm.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from megatron_slm.train.prometheus import PrometheusExport
    from megatron_slm.train.tensorboard_events import TensorBoardScalars

P = ParamSpec("P")


@contextmanager
def stop_when_full(directory: Path) -> Iterator[None]:
    """A run that can no longer say what it does stops; its checkpoints stay as they are.

    Raises:
        LogError: the disk is full, or the directory has gone or become read-only.
    """
    try:
        yield
    except BrokenPipeError:  # standard output, not a file of ours
        raise
    except OSError as error:
        raise LogError(
            f"{directory} cannot be written any more ({error.strerror or error}); the run stops here. Its published "
            "checkpoints are as they were: make room, and start the same command again."
        ) from error


def _on_disk(method: Callable[P, None]) -> Callable[P, None]:
    """A method of the writer whose failures to write are one sentence."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        writer: Any = args[0]
        with stop_when_full(writer._run.path):
            method(*args, **kwargs)

    return guarded


class MetricsWriter(Hook):
    """Given to the loop on exactly one rank: as in Megatron the last, which has the loss without another exchange."""

    def __init__(
        self,
        directory: Path,
        log: LogConfig,
        *,
        step: int,
        train_iters: int,
        seq_length: int,
        throughput: Throughput,
        memory: Callable[[], MemoryUse],
        loss_name: str = LM_LOSS,
    ) -> None:
        """Open the files of the run for appending.

        Args:
            directory: ``runs/NAME``; must exist.
            log: intervals, and what is written.
            step: updates already made. Records and events of later steps, left by a run that was stopped, are cut.
            train_iters: updates of the whole run.
            seq_length: tokens of one sample.
            throughput: rates of this job.
            memory: see :func:`megatron_slm.train.memory_use.memory_source`.
            loss_name: of the stage's loss.
        """
        self._loss_name = loss_name
        self._run, self._step, self._train_iters = RunDirectory(directory), step, train_iters
        self._interval, self._seq_length = log.log_interval, seq_length
        self._throughput, self._memory = throughput, memory
        self._metrics = _open_records(self._run.metrics, step)
        self._validations = _open_records(self._run.validation, step)
        self._dynamics: TextIO | None = None
        self._tensorboard = _open_tensorboard(self._run.tensorboard, step) if log.tensorboard else None
        self._console = Console(self._run.log, train_iters=train_iters, step=step, progress_bar=log.progress_bar)
        self._since_line: list[StepResult] = []
        self._beside: dict[str, Any] = {}
        self._line_beside = ""
        self._prometheus = _open_prometheus(log, directory.name)

    @_on_disk
    def say(self, line: str) -> None:
        """Print a line of the run and keep it in ``log.txt``."""
        self._console.say(line)

    def warn(self, line: str) -> None:
        """Print a warning, and keep it in ``progress.txt`` too."""
        self.say(f"warning: {line}")
        self._progress(f"Warning\t{line}")

    @_on_disk
    def before_run(self, state: Any) -> None:
        """Note the start in ``progress.txt``."""
        self._progress(f"Starting job\tIteration: {self._step}{restarts_text(os.environ)}")
        if self._prometheus is not None:
            self.say(f"metrics for Prometheus: {', '.join(self._prometheus.places)}")

    def beside_step(self, values: dict[str, Any], line: str = "") -> None:
        """Values that belong to the next step's record.

        Args:
            values: floats are also printed, and go to TensorBoard; of a {name: number} the latter alone.
            line: printed below the step's line, if it has one.
        """
        self._beside |= values
        self._line_beside = line or self._line_beside

    @_on_disk
    def after_step(self, state: Any, result: StepResult) -> None:
        """Record the step; at the interval and at the target also print Megatron's line and write TensorBoard."""
        memory = self._memory()
        record = step_record(
            result,
            seq_length=self._seq_length,
            throughput=self._throughput,
            memory_bytes=memory.peak_bytes,
            loss_name=self._loss_name,
        )
        if state is not None and len(state.cursor.order.sources) > 1:
            record["consumed_by_source"] = state.cursor.consumed_by_source
        record |= cleaned(self._beside)
        _write(self._metrics, record)
        if self._prometheus is not None:
            self._prometheus.show(record)
        self._since_line.append(result)
        self._console.advance(loss=result.loss, tokens_per_second=record["tokens_per_second"])
        if result.step % self._interval == 0 or result.step == self._train_iters:
            self._line(memory)
        self._beside, self._line_beside = {}, ""

    @_on_disk
    def validation(
        self,
        loss: float,
        *,
        tokens: int,
        step: int,
        consumed_samples: int,
        by_source: Mapping[str, float] | None = None,
        averaged: float | None = None,
        shares: Mapping[str, float] | None = None,
        others: Mapping[str, float] | None = None,
    ) -> None:
        """Report a mean held-out loss over ``tokens`` tokens, taken after ``step`` updates.

        It goes to ``validation.jsonl``, whose records look like those of ``metrics.jsonl``.

        Args:
            by_source: the loss of each source of a mixture.
            averaged: the loss of the averaged weights.
            shares: of each source of a mixture from here on, where they follow the losses.
            others: what the stage's loss logs beside it, of the same samples.
        """
        name_of_loss, key = self._loss_name, self._loss_name.replace(" ", "_")
        parts = {f"{name_of_loss} validation/{name}": part for name, part in (by_source or {}).items()}
        if averaged is not None:
            parts[f"{name_of_loss} validation ema"] = averaged
        parts |= {f"{name} validation": value for name, value in (others or {}).items()}
        record: dict[str, Any] = {
            "step": step,
            "consumed_samples": consumed_samples,
            key: finite(loss),
            f"{key}_bits": float(loss).hex(),
            "loss_tokens": tokens,
            **{name: finite(value) for name, value in (others or {}).items()},
        }
        if by_source:
            record[f"{key}_by_source"] = {name: finite(part) for name, part in by_source.items()}
        if averaged is not None:
            record[f"{key}_ema"] = finite(averaged)
        if shares is not None:
            record["shares"] = dict(shares)
        # A run that is started again may validate the same step again: one record of it is kept.
        known = step in {other["step"] for other in read_records(self._run.validation)[-1:]}
        if known:
            truncate_records(self._run.validation, step - 1)
        _write(self._validations, record)
        for line in validation_lines(loss, where=f"iteration {step}", loss_name=name_of_loss):
            self.say(line)
        if parts:
            self.say(" " + " | ".join(f"{name}: {part:.6E}" for name, part in parts.items()))
        if self._tensorboard is not None and not known:
            perplexity = {"lm loss validation ppl": capped_perplexity(loss)} if name_of_loss == LM_LOSS else {}
            scalars = {f"{name_of_loss} validation": loss, **perplexity, **parts}
            self._tensorboard.write(scalars, step=step, consumed_samples=consumed_samples)

    @_on_disk
    def dynamics(self, record: dict[str, Any]) -> None:
        """Keep one measurement of the training dynamics in ``dynamics.jsonl`` and TensorBoard.

        Args:
            record: "step", "consumed_samples", and numbers or {layer: number} by name.
        """
        if self._dynamics is None:
            self._dynamics = _open_records(self._run.dynamics, self._step)
        _write(self._dynamics, cleaned(record))
        if self._tensorboard is not None:
            self._tensorboard.write(_tags(record), step=record["step"], consumed_samples=record["consumed_samples"])

    @_on_disk
    def rewind(self, state: Any) -> None:
        """Cut what was recorded after the checkpoint that the run went back to."""
        self._step = state.step
        self._since_line = [result for result in self._since_line if result.step <= state.step]
        self._console.rewind(state.step)
        for file in (self._metrics, self._validations, self._dynamics):
            if file is not None:
                truncate_records(Path(file.name), state.step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _open_tensorboard(self._run.tensorboard, state.step)
        self._progress(f"Rolled back\tIteration: {state.step}")

    @_on_disk
    def after_save(self, state: Any, checkpoint: Path) -> None:
        """Note the checkpoint in ``progress.txt``, and print where it is."""
        self.say(f"saved {checkpoint}")
        self._progress(f"Saved checkpoint\tIteration: {int(checkpoint.name.removeprefix('iter_'))}")

    @_on_disk
    def after_run(self, state: Any, code: int) -> None:
        """Print what is left, note the end and close every file."""
        if self._since_line:
            self._line(self._memory())
        self._progress(f"Ending job\tExit code: {code}")
        self._close()

    def on_error(self, state: Any, error: UserError) -> None:
        """Keep why the run ends, as far as anything can still be written."""
        with contextlib.suppress(OSError, UserError):
            if self._since_line:
                self._line(self._memory())
            self._console.keep(f"error: {error}")
            self._progress(f"Ending job\tExit code: {error.exit_code}")
            self._close()

    def _close(self) -> None:
        if self._prometheus is not None:
            self._prometheus.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for file in (self._metrics, self._validations, self._dynamics):
            if file is not None:
                file.close()
        self._console.close()

    def _line(self, memory: MemoryUse) -> None:
        results, self._since_line = self._since_line, []
        last, seconds = results[-1], sum(result.times.total for result in results)
        tokens = self._seq_length * sum(result.batch_size for result in results)
        tflops = self._throughput.tflops_per_second(tokens, seconds)
        now = datetime.now()
        self.say(
            iteration_line(
                results,
                train_iters=self._train_iters,
                tflops_per_second=tflops,
                now=now,
                loss_name=self._loss_name,
            )
        )
        beside = {name.replace("_", " "): value for name, value in self._beside.items() if isinstance(value, float)}
        if self._loss_name != LM_LOSS:
            beside = {**last.extra, **beside}
        if beside:
            self.say(" " + " | ".join(f"{name}: {value:.6E}" for name, value in beside.items()))
        if self._line_beside:
            self.say(f" {self._line_beside}")
        if self._prometheus is not None:
            self._prometheus.write()
        if self._tensorboard is None:
            return
        scalars = {
            **{name: value for name, value in beside.items() if finite(value) is not None},
            **_tags({name: _numbers(value) for name, value in self._beside.items() if isinstance(value, dict)}),
            "learning-rate": last.learning_rate,
            "batch-size": last.batch_size,
            "loss-scale": 1.0,
            "grad-norm": last.grad_norm,
            self._loss_name: last.loss,
            **last.extra,
            "iteration-time": seconds / len(results),
            "throughput": tflops,
            "world-size": self._throughput.world_size,
            **memory.tags,
        }
        self._tensorboard.write(scalars, step=last.step, consumed_samples=last.consumed_samples)
        # A killed run keeps what was written up to its last line.
        self._tensorboard.flush()

    def _progress(self, event: str) -> None:
        append_progress(self._run.progress, event, world_size=self._throughput.world_size, now=datetime.now())


def cleaned(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for every number that JSON has no word for, however deep it lies."""
    return {name: _clean(value) for name, value in record.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return cleaned(value)
    return finite(value) if isinstance(value, float) else value


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _tags(record: dict[str, Any]) -> dict[str, float]:
    """ "grad_norm": {"layer_3": x} -> "grad-norm/layer_3": x; numbers that are not finite are left out."""
    tags: dict[str, float] = {}
    for name, value in record.items():
        if name in ("step", "consumed_samples"):
            continue
        tag = name.replace("_", "-")
        parts = {f"{tag}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {tag: value}
        tags.update({key: part for key, part in parts.items() if finite(part) is not None})
    return tags


def _open_tensorboard(directory: Path, step: int) -> TensorBoardScalars:
    # Imported by the one rank that writes, and only if it does: a tenth of a second of every other rank's start.
    from megatron_slm.train.tensorboard_events import TensorBoardScalars

    return TensorBoardScalars(directory, step)


def _open_prometheus(log: LogConfig, run: str) -> PrometheusExport | None:
    if log.prometheus_port is None and log.prometheus_file is None:
        return None
    from megatron_slm.train.prometheus import PrometheusExport

    return PrometheusExport(log, run)


def _open_records(path: Path, step: int) -> TextIO:
    """Cut what comes after ``step`` and append, line by line: a killed run loses no step it has finished."""
    truncate_records(path, step)
    return path.open("a", encoding="utf-8", buffering=1)


def _write(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, allow_nan=False) + "\n")
