"""A running teacher: its last hidden states go with every micro-batch, its output matrix with the student's ending.

Shapes: B micro-batch, S sequence of this cp rank, G hidden of the teacher, V_l rows of a tp rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.rollout.score import scores
from megatron_slm.stages.reference import Frozen
from megatron_slm.train.step import StepPlan

FIELD = "teacher_hidden"


class TeacherMatrix:
    """The teacher's output matrix, given to the student's ending once the teacher is there."""

    def __init__(self) -> None:
        self._model: Any = None

    def take(self, teacher: Frozen) -> None:
        """From the chunk that ends the teacher, on the ranks that have it."""
        self._model = unwrap(teacher.chunks[-1])

    def __call__(self) -> Tensor:
        """This tp rank's rows [V_l, G]."""
        assert self._model is not None, "take comes first"
        model = self._model
        weight: Tensor = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else model.output_layer.weight
        )
        return weight


def add_hidden(teacher: Frozen, micro_batches: Sequence[Batch], plan: StepPlan) -> None:
    """Give local micro-batches ``teacher_hidden`` [B, S, G] on the ranks that end the model. Collective."""
    found = scores(teacher.chunks, list(micro_batches), seq_length=plan.seq_length, groups=plan.groups)
    for batch, hidden in zip(micro_batches, found, strict=False):
        batch[FIELD] = hidden
