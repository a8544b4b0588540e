"""Step inputs of a stage that learns from what its own model says: rollouts, each trained on in several steps.

A rollout answers ``prompts`` prompts of the order, from the cursor on. Its samples lie in mini-batches by prompt; every
epoch takes each of them once, in their order, so that no step depends on the layout. Each step moves the cursor by its
share of the prompts: where the run stands inside a rollout follows from the cursor alone, and what is not yet trained
on is a part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_slm.data.cursor import Cursor
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages.pretrain import ON_HOST
from megatron_slm.train.hook import OfRank
from megatron_slm.train.step import StepInput, TrainState

NAME = "rollout"

Make = Callable[[Cursor], list[list[Batch]]]
"""Answers the prompts from a cursor on: the micro-batches of each mini-batch, on their device. Collective."""


class RolloutPlan(NamedTuple):
    """How a rollout is trained on: so many mini-batches of so many prompts, over all ranks, so many times."""

    mini_batches: int
    prompts: int
    epochs: int

    @property
    def steps(self) -> int:
        """In which a rollout is trained on."""
        return self.mini_batches * self.epochs

    @property
    def per_step(self) -> int:
        """Prompts that a step moves the cursor by."""
        return self.prompts // self.epochs


class Held(NamedTuple):
    """A rollout that is being trained on: where its prompts begin, and the micro-batches of each mini-batch."""

    start: int
    mini_batches: list[list[Batch]]


class Rollouts(OfRank):
    """The rollout in hand, as a part of the run's state."""

    def __init__(self, plan: RolloutPlan, device: torch.device) -> None:
        assert plan.prompts % plan.epochs == 0, f"{plan.prompts} prompts do not divide over {plan.epochs} epochs"
        self._plan, self._device = plan, device
        self._held: Held | None = None
        self.dropped = ""
        """Why the saved rollout was not taken up, as a sentence; empty where it was."""

    def inputs(self, state: TrainState, make: Make) -> Iterator[StepInput]:
        """Endless steps, each from where the state's cursor then stands: a new rollout wherever none is in hand."""
        while True:
            cursor = state.cursor
            taken = self._taken(cursor)
            if self._held is None or taken is None:
                self._held, taken = Held(cursor.consumed_samples, make(cursor)), 0
            batches = self._held.mini_batches
            yield StepInput(batches[taken % len(batches)], cursor.advance(self._plan.per_step))

    def _taken(self, cursor: Cursor) -> int | None:
        """Steps of the rollout in hand before ``cursor``; None where that is not a place inside of it."""
        if self._held is None:
            return None
        steps, rest = divmod(cursor.consumed_samples - self._held.start, self._plan.per_step)
        inside = 0 <= steps < self._plan.steps and not rest
        return steps if inside else None

    def sharded_state(self, models: dict[str, Any]) -> dict[str, Any]:
        """What every rank has in hand; to be filled, where it is asked for before a load."""
        held = None if self._held is None else [self._held.start, _on_host(self._held.mini_batches), *self._plan]
        place = (dist.get_world_size(),), (dist.get_rank(),)
        return {"held": ShardedObject(NAME, held, *place, replica_id=0)}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take the saved rollout up again, unless it was made for other steps than these."""
        self._held = None
        if loaded["held"] is None:
            return
        start, mini_batches, *plan = loaded["held"]
        if plan == list(self._plan):
            self._held = Held(start, _moved(mini_batches, self._device))
            return
        made = "{} mini-batches of {} prompts, {} times".format(*plan) if plan else "steps that are not known"
        own = "{} of {} prompts, {} times".format(*self._plan)
        self.dropped = (
            f"the rollout in hand was made for {made}, and this run takes {own} (rollout.prompts, "
            "train.global_batch_size, ppo.ppo_epochs, grpo.grpo_iterations): the rest of it is dropped, and the "
            "prompts from there on are answered anew."
        )


def _on_host(mini_batches: list[list[Batch]]) -> list[list[Batch]]:
    return _moved(mini_batches, torch.device("cpu"))


def _moved(mini_batches: list[list[Batch]], device: torch.device) -> list[list[Batch]]:
    return [
        [{name: field if name in ON_HOST else field.to(device) for name, field in batch.items()} for batch in batches]
        for batches in mini_batches
    ]
