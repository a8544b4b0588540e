"""The hook that keeps a run's first steps whole: every rank's weights, module outputs and gradients, as numbers.

Fingerprints say whether bits are equal, which under two layouts they never are. What a layout computes wrongly is found
by its numbers: ``mslm replay layout-diff`` has the first steps of both runs kept, and compares them with one rank's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.replay.shards import Shard, gradient_shards, local_shards
from megatron_slm.replay.watch import Place, Watch, Watched
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.step import StepInput, TrainState

FOLDER = "whole"
"""In a run's ``replay/``: one file a step and rank."""


@dataclass
class Witnessed:
    """One step of one rank.

    Attributes:
        weights: as the step began.
        watched: module outputs and their gradients, micro-batch by micro-batch.
        gradients: reduced, not clipped.
    """

    place: Place
    weights: list[Shard] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    gradients: list[Shard] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0


class Witness(Hook):
    """Keeps the steps up to ``last`` in ``folder``. It exchanges nothing but weights that are on their way anyway."""

    def __init__(self, folder: Path, groups: Any, *, rank: int, last: int) -> None:
        """Keep nothing yet."""
        self._folder, self._rank, self._last = folder / FOLDER, rank, last
        self._place = Place.of(groups)
        self._watch: Watch | None = None

    def before_forward(self, state: TrainState, inputs: StepInput) -> None:
        """Keep the weights, and begin to watch the modules."""
        if state.step >= self._last:
            return
        with gathered_parameters(state.chunks):
            self._found = Witnessed(self._place, local_shards(state.chunks))
        self._watch = Watch(state.chunks)

    def after_backward(self, state: TrainState, inputs: StepInput) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._found.watched = self._watch.stop()

    def before_update(self, state: TrainState, inputs: StepInput) -> None:
        """Keep the reduced gradients."""
        if self._watch is not None:
            self._found.gradients = gradient_shards(state.chunks, state.optimizer)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Write the step."""
        if self._watch is None:
            return
        self._watch = None
        self._found.loss, self._found.grad_norm = result.loss, result.grad_norm
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(_plain(self._found), self._folder / f"step_{result.step:07d}_rank_{self._rank:05d}.pt")


def steps_in(run: Path) -> list[int]:
    """Steps that a run has kept whole."""
    found = (re.match(r"step_(\d+)_rank_0+\.pt$", path.name) for path in (run / "replay" / FOLDER).glob("*.pt"))
    return sorted(int(match[1]) for match in found if match)


def read(run: Path, step: int) -> list[Witnessed]:
    """One step of every rank that has kept it.

    Raises:
        CheckpointError: a file is damaged.
    """
    return [_witnessed(path) for path in sorted((run / "replay" / FOLDER).glob(f"step_{step:07d}_rank_*.pt"))]


def _plain(found: Witnessed) -> dict[str, Any]:
    """What torch reads again without running anything."""
    return {
        "place": tuple(found.place),
        "weights": _plain_shards(found.weights),
        "watched": [tuple(one) for one in found.watched],
        "gradients": _plain_shards(found.gradients),
        "numbers": (found.loss, found.grad_norm),
    }


def _plain_shards(shards: Iterable[Shard]) -> list[tuple[str, tuple[int, ...], list[tuple[int, int]], Tensor]]:
    return [(one.name, one.shape, [(cut.start, cut.stop) for cut in one.place], one.values) for one in shards]


def _shards(plain: Iterable[Any]) -> list[Shard]:
    return [
        Shard(name, tuple(shape), tuple(slice(*cut) for cut in cuts), values) for name, shape, cuts, values in plain
    ]


def _witnessed(path: Path) -> Witnessed:
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True)
        return Witnessed(
            Place(*plain["place"]),
            _shards(plain["weights"]),
            [Watched(*one) for one in plain["watched"]],
            _shards(plain["gradients"]),
            *plain["numbers"],
        )
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"{path} is damaged ({error!r}); make the run's first steps again.") from error
