"""The critic of PPO: a model of its own that says what a half-finished answer is worth, with an optimizer of its own.

It takes its step on the same micro-batches as the policy, once the policy's gradients are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.parallel.gradients import zero_gradients
from megatron_slm.parallel.groups import is_last_pipeline_rank, sum_over_world_from
from megatron_slm.parallel.pipeline import Batch, LossFunction, run_schedule
from megatron_slm.rollout.score import scores
from megatron_slm.train.hook import Hook
from megatron_slm.train.model_part import ModelPart
from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate
from megatron_slm.train.step import StepInput, StepPlan, TrainState

NAME = "critic"


class Critic(ModelPart, Hook):
    """A second model with gradients: a hook that takes its steps, and a part of the checkpoint.

    Args:
        chunks, optimizer: of the critic, laid out as the policy.
        loss: its loss, see ``ppo.value_loss``.
        logged: what that logs.
        peak: its peak learning rate.
        scale: its learning rate over the policy's at every step; None where the policy's is 0 throughout, so that
            it stays at its peak.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        optimizer: Any,
        *,
        loss: LossFunction,
        logged: Sequence[str],
        peak: float,
        scale: float | None,
    ) -> None:
        super().__init__(NAME, chunks, optimizer)
        self._loss, self._logged, self._peak, self._scale = loss, logged, peak, scale
        self._plan: StepPlan | None = None
        self._write: Callable[[dict[str, Any]], None] | None = None

    def attach(self, plan: StepPlan, write: Callable[[dict[str, Any]], None] | None) -> None:
        """What every step needs; ``write`` puts numbers beside the step's record, on the rank that logs."""
        self._plan, self._write = plan, write

    def values(self, batches: list[Batch]) -> list[Tensor]:
        """What it says now of every label [B, S], on the ranks that end the model. Collective."""
        assert self._plan is not None, "attach comes first"
        return scores(self.chunks, batches, seq_length=self._plan.seq_length, groups=self._plan.groups)

    def before_update(self, state: TrainState, inputs: StepInput) -> None:
        """Take the critic's step. Collective."""
        plan = self._plan
        assert plan is not None, "attach comes first"
        zero_gradients(self.chunks)
        self.optimizer.zero_grad()
        entries = run_schedule(
            self.chunks,
            inputs.micro_batches,
            self._loss,
            forward_only=False,
            seq_length=plan.seq_length,
            groups=plan.groups,
        )
        norm = gradient_norm(self.optimizer)
        if self._scale is None:
            set_learning_rate(self.optimizer, self._peak, self._peak)
        else:
            set_learning_rate(
                self.optimizer, self._scale * plan.learning_rate(state.step), self._scale * plan.peak_learning_rate
            )
        apply_update(self.optimizer, norm)
        total = torch.zeros(len(self._logged), 2, dtype=torch.float64, device=plan.device)
        for entry in entries:
            total += torch.stack([entry[name] for name in self._logged])
        sums = sum_over_world_from(total, counts=is_last_pipeline_rank(plan.groups) and plan.groups.tp.rank() == 0)
        if self._write is not None:
            means = {
                name: value / count if count else 0.0
                for name, (value, count) in zip(self._logged, sums.tolist(), strict=True)
            }
            self._write({"val/loss": means.pop("loss"), **means, "val/grad_norm": norm})
