"""``mslm train --sdc-every S``: forward and backward of every S-th step once more, before anything of it is applied.

Both passes begin with the same weights, micro-batches and random states, so that all they compute must be equal to the
last bit, on every rank. Where it is not, a third pass decides which of the two was right.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.errors import FaultError
from megatron_slm.parallel.gradients import before_reduction
from megatron_slm.parallel.groups import any_rank
from megatron_slm.replay.diff import Divergence, frame_difference
from megatron_slm.replay.modules import Listener
from megatron_slm.replay.page import Page
from megatron_slm.replay.passes import Fault, Pair, fault_text, judged
from megatron_slm.replay.slots import Slot
from megatron_slm.replay.stream import Flag, Frame, Phase, Records, StreamWriter
from megatron_slm.replay.tensors import Named, part_name
from megatron_slm.train.hook import Hook
from megatron_slm.train.optimizer_state import Master, named_masters, named_parameters
from megatron_slm.train.step import StepInput, StepPlan, TrainState, forward_backward


class Taken(NamedTuple):
    """Fingerprints of what one pass has computed on this rank."""

    frame: Frame
    names: list[str]


class Report(NamedTuple):
    """One rank: where it runs, and its first difference between each two passes."""

    slot: Slot
    parted: Mapping[Pair, Divergence | None]


class Passes(Hook):
    """Makes forward and backward of every ``interval``-th step again; what the step computes stays as it is.

    It costs one more forward and backward and an exchange of one number in such a step, and nothing in the others.
    """

    def __init__(
        self,
        interval: int,
        plan: StepPlan,
        replicas: Sequence[frozenset[int]],
        warn: Callable[[str], None],
        *,
        stops: bool,
    ) -> None:
        """Check nothing yet.

        Args:
            replicas: sets of ranks that exchange anything before gradients are reduced.
            warn: writes a line into the run's log; nothing on ranks without one.
            stops: end the run at a fault; else it goes on with what two of three passes gave.
        """
        self._interval, self._plan, self._replicas = interval, plan, replicas
        self._warn, self._stops = warn, stops
        self._page = Page()
        self._listening = contextlib.ExitStack()
        self._random: dict[str, Any] | None = None

    def before_run(self, state: TrainState) -> None:
        """Find the tensors."""
        self._masters: list[Master] = named_masters(state.optimizer, list(state.chunks))
        self._names: dict[nn.Parameter, str] = {param: name for name, param in named_parameters(list(state.chunks))}
        self._listener = Listener(state.chunks, self._page, layers=True)

    def rewind(self, state: TrainState) -> None:
        """The optimizer's tensors are others now."""
        self._drop()
        self.before_run(state)

    def before_forward(self, state: TrainState, inputs: StepInput) -> None:
        """Remember what the pass begins with, and listen to it."""
        self._drop()
        if (state.step + 1) % self._interval == 0:
            self._random = state.random.capture()
            self._listen(state)

    def checked(self, state: TrainState, inputs: StepInput, logged: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Make the pass again, compare, and leave gradients and log of a right one.

        Raises:
            FaultError: on every rank; the passes differ, and the run is to stop or all three do.
        """
        if self._random is None:
            return logged
        taken, behind = [self._take(state)], state.random.capture()
        self._again(state, inputs, taken)
        if any_rank(self._difference(state, taken[0], taken[1]) is not None, self._plan.device):
            third = self._again(state, inputs, taken)
            state.random.restore(behind)
            reports = self._gathered(state, taken)
            found = judged([report.parted for report in reports], self._replicas)
            logged = third if found.struck == 0 else logged
            self._act(state.step + 1, found, [report.slot for report in reports])
        state.random.restore(behind)
        self._random = None
        return logged

    def _act(self, step: int, found: Fault, slots: Sequence[Slot]) -> None:
        said = fault_text(step, found, slots)
        if found.struck is None:
            raise FaultError(f"{said} Nothing of this step was applied. mslm doctor determinism lists such choices.")
        if self._stops:
            raise FaultError(
                f"{said} Nothing of this step was applied; the newest checkpoint is what the run goes on from. Leave "
                "that place out, or set replay.on_fault=continue to go on with what two of three passes give."
            )
        self._warn(f"{said} Gone on with what the other two gave (replay.on_fault=continue).")

    def _gathered(self, state: TrainState, taken: Sequence[Taken]) -> list[Report]:
        pairs = combinations(range(len(taken)), 2)
        parted = {(one, other): self._difference(state, taken[one], taken[other]) for one, other in pairs}
        slot = Slot(platform.node(), int(os.environ.get("MSLM_SLOT", dist.get_rank())))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, Report(slot, parted))
        return everyone

    def _difference(self, state: TrainState, one: Taken, other: Taken) -> Divergence | None:
        found = frame_difference(one.frame, other.frame, (one.names, other.names))
        if found is None:
            return None
        key, index, only_in = found
        stage = self._plan.groups.pp
        return Divergence(state.step + 1, False, dist.get_rank(), key, index, stage.rank(), stage.size(), only_in)

    def _again(self, state: TrainState, inputs: StepInput, taken: list[Taken]) -> list[dict[str, Tensor]]:
        """The pass once more; gives what the loss has logged."""
        assert self._random is not None, "a step that is checked has been begun"
        state.random.restore(self._random)
        self._listen(state)
        logged = forward_backward(state, self._plan, inputs)
        taken.append(self._take(state))
        return logged

    def _listen(self, state: TrainState) -> None:
        self._listener.start()
        self._listening.callback(self._listener.stop)
        self._listening.enter_context(before_reduction(state.chunks, self._note_local))

    def _note_local(self, params: list[Any]) -> None:
        names = [self._names[param] for param in params]
        self._page.note(Phase.LOCAL_GRADIENT, 0, names, [param.main_grad for param in params])

    def _take(self, state: TrainState) -> Taken:
        """The end of a pass: reduced gradients, as far as this rank updates with them, and all digests."""
        self._listening.close()
        own = Named([], [])
        for master in self._masters:
            param: Any = master.param  # core adds the buffer to it
            flat = param.main_grad.view(-1)
            own.add(part_name(master), flat[master.start : master.start + master.tensor.numel()])
        self._page.note(Phase.GRADIENT, 0, own.names, own.tensors)
        kept = _Kept()
        self._page.write(cast(StreamWriter, kept), state.step + 1, 0)  # it asks for no more than these two methods
        return Taken(kept.frame, kept.names)

    def _drop(self) -> None:
        self._listening.close()
        self._page.clear()
        self._random = None


class _Kept:
    """Takes one frame, as a stream's writer does, and keeps it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a name."""
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]

    def write(self, step: int, records: Records, flags: int) -> None:
        """Keep the frame."""
        self.frame = Frame(step, Flag(flags), records)
