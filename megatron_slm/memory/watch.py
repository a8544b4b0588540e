"""``train --memory-ledger``: an early step is measured and laid beside the prediction; no memory left is explained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_slm.errors import UserError
from megatron_slm.memory import compare
from megatron_slm.memory.measure import Measurement, StepRecorder, allocator_measurement
from megatron_slm.memory.report import gib
from megatron_slm.parallel.groups import is_last_pipeline_rank
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import StepPlan

FOLDER, PREDICTED = "memory", "predicted.json"
MEASURED_STEP = 2
"""Of this process: the first one leaves what all later ones find."""
PATIENCE_SECONDS = 600.0
"""For the prediction, when the run ends before it."""


class MemoryWatch(Hook):
    """Measures on the first rank of every pipeline stage, and compares on the rank that writes the log.

    Nothing here is an exchange: the ranks meet in the run's directory.
    """

    def __init__(
        self, plan: StepPlan, directory: Path, command: list[str], say: Callable[[str], None] | None, *, rank: int
    ) -> None:
        """``command``: what ``mslm memory`` is to be asked; ``say``: of the rank that writes the log, else None."""
        groups = plan.groups
        self._folder, self._command, self._say = directory / FOLDER, command, say
        self._rank, self._stage, self._stages = rank, groups.pp.rank(), groups.pp.size()
        self._measures = groups.tp.rank() == 0 and groups.dp_cp.rank() == 0
        self._ends_model = is_last_pipeline_rank(groups)
        self._on_gpu = plan.device.type == "cuda"
        self._steps = 0
        self._recorder: StepRecorder | None = None
        self._prediction: compare.Prediction | None = None

    def before_run(self, state: Any) -> None:
        """Old measurements go; the prediction begins."""
        if self._measures:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._measured(self._stage).unlink(missing_ok=True)
        if self._say is not None:
            self._prediction = compare.Prediction([*self._command, "--json"], self._folder / PREDICTED)

    def before_forward(self, state: Any, inputs: Any) -> None:
        """Begin to follow the step."""
        self._steps += 1
        if self._measures and not self._on_gpu and self._steps == MEASURED_STEP:
            self._recorder = StepRecorder(state.chunks, state.optimizer)
            self._recorder.__enter__()

    def after_step(self, state: Any, result: StepResult) -> None:
        """Write what was measured; compare once everything is there."""
        if self._measures and self._steps == MEASURED_STEP and not self._measured(self._stage).exists():
            found = self._finish(state)
            temporary = self._measured(self._stage).with_suffix(".part")
            temporary.write_text(compare.as_json(found), encoding="utf-8")
            temporary.rename(self._measured(self._stage))
        if self._prediction is not None and self._prediction.is_over() and self._all_measured():
            self._compare(self._prediction)

    def after_run(self, state: Any, code: int) -> None:
        """The comparison, if it is not made yet."""
        self._leave()
        if self._prediction is not None and self._all_measured():
            self._prediction.wait(PATIENCE_SECONDS)
            self._compare(self._prediction)
        elif self._prediction is not None and self._say is not None:
            self._prediction.wait(0.0)
            self._say(f"memory: nothing was measured, the run ended before step {MEASURED_STEP}")

    def on_error(self, state: Any, error: UserError) -> None:
        """Nobody is left to read it."""
        self._leave()
        if self._prediction is not None:
            self._prediction.wait(0.0)

    def rewind(self, state: Any) -> None:
        """A step that is made again is measured as any other."""
        self._leave()

    def _finish(self, state: Any) -> Measurement:
        if self._recorder is None:
            return allocator_measurement(state.chunks, state.optimizer, rank=self._rank, pipeline_rank=self._stage)
        recorder = self._recorder
        self._leave()
        return recorder.measurement(self._rank, self._stage, ends_model=self._ends_model)

    def _leave(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def _measured(self, stage: int) -> Path:
        return self._folder / f"measured_stage_{stage}.json"

    def _all_measured(self) -> bool:
        return all(self._measured(stage).exists() for stage in range(self._stages))

    def _compare(self, prediction: compare.Prediction) -> None:
        self._prediction = None
        say = self._say if self._say is not None else print
        texts, written = [], []
        for stage in range(self._stages):
            predicted = prediction.of_stage(stage)
            if predicted is None:
                say(f"memory: there is no prediction to compare with: {prediction.text().strip()[-500:]}")
                return
            measured = json.loads(self._measured(stage).read_text(encoding="utf-8"))
            rows = compare.compared(predicted, measured)
            texts.append(f"pipeline stage {stage}, rank {measured['rank']}\n{compare.table(rows)}")
            if measured["measured_reserved_bytes"] is not None:
                texts[-1] += f"\nreserved by torch's allocator: {gib(measured['measured_reserved_bytes'])} GiB"
            written.append({"pipeline_rank": stage, "rank": measured["rank"], "rows": [row._asdict() for row in rows]})
        text = "\n\n".join(texts)
        (self._folder / "comparison.txt").write_text(text + "\n", encoding="utf-8")
        (self._folder / "comparison.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        for line in text.splitlines():
            say(f"memory: {line}".rstrip())


@contextlib.contextmanager
def explained_out_of_memory(directory: Path, command: list[str], *, rank: int, pipeline_rank: int) -> Iterator[None]:
    """When the device's memory is not enough, write what it held and what would fit; the error goes on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        folder = directory / FOLDER
        name = f"out_of_memory_rank_{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            # Strings and numbers of the allocator: nothing of it needs memory of the device.
            state = {"statistics": torch.cuda.memory_stats(), "segments": torch.cuda.memory_snapshot()}
            (folder / f"{name}.json").write_text(json.dumps(state, default=str), encoding="utf-8")
        asked = [*command, "--stage", str(pipeline_rank), "--why", "--fit"]
        prediction = compare.Prediction(asked, folder / f"{name}_predicted.txt")
        prediction.wait(PATIENCE_SECONDS)
        text = f"rank {rank}, pipeline stage {pipeline_rank}: {error}\n\n{prediction.text()}"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"out of memory: {folder / name}.txt says where every byte was to go, and what would fit", flush=True)
        raise
