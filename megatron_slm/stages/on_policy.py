"""Distillation on the student's own answers: of some examples the answer is drawn anew before each step.

Which ones is a function of seed and position alone (arXiv 2306.13649, algorithm 1, by example instead of by batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_slm.data.examples.document import Document
from megatron_slm.data.examples.prompts import Prompt
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.rollout.philox import uniforms
from megatron_slm.stages.experience import Sampler, micro_batches_of_all
from megatron_slm.stages.pretrain import local_batch
from megatron_slm.stages.sequences import Shape, filled_up, lay_out_documents
from megatron_slm.train.step import StepPlan

CHOICE = 0xFFFFFFFF
"""Position that no token has, so that the choice of an example shares no number with its draws."""


class Example(NamedTuple):
    """A document of the data under the number of its sample in the run."""

    sample: int
    document: Document

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first label that counts."""
        counted = np.flatnonzero(self.document.weights[1:])
        return tuple(self.document.tokens[: counted[0] + 1].tolist()) if len(counted) else ()


def micro_batches(
    examples: Sequence[Example], fraction: float, sampler: Sampler, step: int, plan: StepPlan, shape: Shape
) -> list[Batch]:
    """Local micro-batches of the examples, a ``fraction`` of them with answers of the student. Collective.

    As many on every rank. An example without a prompt or without labels stays as it is.
    """
    own = _chosen(examples, fraction, sampler.sampling.seed)
    prompts = [(each.sample, Prompt(0, 0, each.prompt, {})) for each, mine in zip(examples, own, strict=True) if mine]
    drawn = iter(sampler.answer(prompts, step, plan))
    documents = [next(drawn).document() if mine else each.document for each, mine in zip(examples, own, strict=True)]
    laid = lay_out_documents(documents, shape)
    laid = filled_up(laid, micro_batches_of_all(len(laid.batches), sampler.chunks, plan), shape)
    return [local_batch(batch, plan) for batch in laid.batches]


def numbered(documents: Iterator[tuple[int, int, Document]], most: int) -> list[Example]:
    """(position of the row, place in it, document) -> examples; a row has at most ``most`` documents."""
    return [Example(position * most + place, document) for position, place, document in documents]


def _chosen(examples: Sequence[Example], fraction: float, seed: int) -> list[bool]:
    samples = np.array([each.sample for each in examples], dtype=np.int64)
    numbers = uniforms(seed, 0, samples, np.full(len(samples), CHOICE, dtype=np.int64))
    return [bool(number < fraction and each.prompt) for each, number in zip(examples, numbers, strict=True)]
