"""What import and export share: a block of a checkpoint read, and two tensors compared."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.model.hf import Block
from megatron_slm.train.payload_stream import BlockReader

RECORD = "huggingface"
"""Under this name ``state.json`` remembers what a checkpoint was imported from."""

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def read_block(reader: BlockReader, block: Block, prefix: str = "") -> Tensor:
    """One block of a checkpoint, of its shape without the stacked axes.

    Args:
        prefix: of the stored names.
    """
    offsets = block.index + (0,) * len(block.shape)
    return reader.block(prefix + block.name, offsets, (1,) * len(block.index) + block.shape).view(block.shape)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal to the last bit: NaN is like itself, and -0 is not 0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integers = INTEGERS[first.element_size()]
    return bool(first.contiguous().view(integers).equal(second.contiguous().view(integers)))
