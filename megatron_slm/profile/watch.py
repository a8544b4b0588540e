"""``mslm profile``, and ``profile.profile_steps`` of any run: a hook that profiles some steps of some ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.errors import LogError, UserError
from megatron_slm.parallel import device as device_seam
from megatron_slm.profile import names
from megatron_slm.profile.capture import FOLDER, Capture, captures, remarks
from megatron_slm.profile.collectives import axes_of, collective_ranges
from megatron_slm.profile.config import NSYS, ProfileConfig, Steps
from megatron_slm.profile.modules import ModuleRanges
from megatron_slm.profile.names import Label
from megatron_slm.profile.ranges import Ranges, nvtx_emitter
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import StepPlan, TrainState


class StepProfile(Hook):
    """Profiles its steps; to be called before all other hooks, whose time would else be part of a step.

    What a step computes stays as it is. Ranks that are not profiled take part in one barrier, before the first profiled
    step, so that no rank's profile begins with waiting for one whose profiler was slow to start.
    """

    def __init__(
        self, config: ProfileConfig, steps: Steps, plan: StepPlan, directory: Path, say: Callable[[str], None]
    ) -> None:
        """Record nothing yet.

        Args:
            directory: of the run.
            say: writes a line into the run's log; nothing on ranks without one.
        """
        self._config, self._steps, self._plan, self._say = config, steps, plan, say
        self._folder = directory / FOLDER
        self._profiled = config.profiles(dist.get_rank())
        self._captures: list[Capture] = []
        self._ranges = Ranges([])
        self._listening = contextlib.ExitStack()
        self._prepared = self._met = self._recording = False
        self._step: int | None = None
        self._phase: int | None = None

    def before_run(self, state: TrainState) -> None:
        """Get the tools ready.

        Raises:
            LaunchError: one of them is missing.
        """
        if state.step >= self._steps.last:
            self._say(f"profile: the run goes on after step {state.step}, behind the steps that were to be profiled")
            self._profiled, self._met = False, True
        for line in remarks(self._config.profile_tools, self._plan.device.type):
            self._say(line)
        if NSYS in self._config.profile_tools:
            nvtx_emitter()  # on ranks that are not profiled too: a refusal must be every rank's
        if not self._profiled:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._captures = captures(
            self._config.profile_tools,
            self._folder,
            dist.get_rank(),
            self._plan.device.type,
            axes=axes_of(self._plan.groups),
        )
        self._ranges = Ranges([emitter for capture in self._captures for emitter in capture.emitters])
        self._modules = ModuleRanges(state.chunks, self._ranges)

    def before_step(self, state: TrainState, step: int) -> None:
        """Begin to record with the first profiled step."""
        if not self._met and not self._prepared and step >= self._steps.first - 1:
            self._prepared = True
            for capture in self._captures:
                capture.prepare()
        if not self._met and step >= self._steps.first:
            self._met = True
            self._begin()
        if self._recording:
            self._ranges.close_all()  # a step that was rejected has not ended
            self._step = self._ranges.open(Label(names.STEP, str(step)))
            self._enter(names.DATA)

    def before_forward(self, state: TrainState, inputs: Any) -> None:
        if self._recording:
            self._modules.begin_step()
            self._enter(names.FORWARD_BACKWARD)

    def after_backward(self, state: TrainState, inputs: Any) -> None:
        self._enter(names.JUDGED)

    def before_update(self, state: TrainState, inputs: Any) -> None:
        self._enter(names.OPTIMIZER)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """End the step, and the profile with the last one."""
        if not self._recording:
            return
        device_seam.synchronize(self._plan.device.type)  # its last kernels belong to it
        self._ranges.close_all()
        if result.step >= self._steps.last:
            self._end()
        else:
            self._phase = None
            self._enter(names.BETWEEN)

    def after_run(self, state: TrainState, code: int) -> None:
        """A run that ends early leaves what there is."""
        self._end()
        if not self._met:
            self._say(f"profile: nothing was profiled, the run ended before step {self._steps.first}")

    def on_error(self, state: TrainState, error: UserError) -> None:
        with contextlib.suppress(UserError):
            self._end()

    def _begin(self) -> None:
        dist.barrier()
        if not self._profiled:
            return
        for capture in self._captures:
            capture.start()
        self._recording = True
        about = self._ranges.open(names.rank_label(dist.get_rank(), dist.get_world_size()))
        self._ranges.close(about)
        self._modules.start()
        self._listening.callback(self._modules.stop)
        self._listening.enter_context(collective_ranges(self._ranges, axes_of(self._plan.groups)))

    def _enter(self, phase: str) -> None:
        if self._recording:
            if self._phase is not None:
                self._ranges.close(self._phase)
            self._phase = self._ranges.open(Label(names.PHASE, phase))

    def _end(self) -> None:
        if not self._recording:
            return
        self._ranges.close_all()
        self._recording = False
        self._listening.close()
        try:
            written = [path for capture in self._captures if (path := capture.stop()) is not None]
        except OSError as error:
            raise LogError(f"{self._folder} cannot be written ({error}); make room, or profile fewer steps") from error
        if written:
            print(f"profile: rank {dist.get_rank()} wrote {', '.join(map(str, written))}", flush=True)
