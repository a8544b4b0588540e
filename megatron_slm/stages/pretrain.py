"""Pretraining: next-token prediction over packed documents.

A stage gives the loop an iterator of step inputs and a loss. Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.train.step import StepInput

ON_HOST = ("document_ids",)  # parallel/attention.py reads the documents' boundaries before it launches kernels


def step_inputs(
    loader: TrainLoader, cursor: Cursor, global_batch_size: int, device: torch.device
) -> Iterator[StepInput]:
    """Endless global batches from ``cursor`` on: this rank's micro-batches and the cursor after them."""
    while True:
        following = cursor.advance(global_batch_size)
        batches = loader.micro_batches(cursor.consumed_samples, global_batch_size)
        yield StepInput([to_device(batch, device) for batch in batches], following)
        cursor = following


def loss(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the cross-entropy, number of its tokens, both to log).

    The model has summed already (``parallel/vocab_loss.py``); core divides by the tokens of the whole global batch, so
    the result does not depend on how the batch was cut.
    """
    tokens = batch["loss_mask"].sum()
    return output, tokens.to(torch.int), {"lm loss": torch.stack([output.detach().double(), tokens.double()])}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device`` but those the host reads."""
    return {name: tensor if name in ON_HOST else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
