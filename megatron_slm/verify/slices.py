"""Which part of a one-rank tensor a rank must hold: the layout of activations, in one place.

Shapes: S sequence, B micro-batch, C channels; lower-case letters are this rank's. The sequence is cut over cp in zigzag
(``parallel/context.py``), then over tp in equal parts (sequence parallelism); channels over tp in equal parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.parallel.context import cut
from megatron_slm.replay.watch import Place


def held(whole: Tensor, shape: torch.Size, place: Place, *, gated: bool) -> Tensor | None:
    """The part of a one-rank output that a rank at ``place`` holds; None where the shapes fit no known cut.

    Args:
        whole: [S, B, C].
        shape: of the rank's own output, [s, b, c].
        gated: the channels are two halves (gate and up) that are each divided over tp.
    """
    if whole.dim() != 3 or len(shape) != 3 or whole.shape[1] != shape[1]:
        return None
    part = cut(whole, 0, place.cp, place.cp_size) if place.cp_size > 1 else whole
    if shape[0] * place.tp_size == part.shape[0]:
        part = part.chunk(place.tp_size, 0)[place.tp]
    if shape[2] * place.tp_size == part.shape[2]:
        part = _channels(part, place, gated=gated)
    return part if part.shape == shape else None


def three_axes(values: Tensor, batch: int) -> Tensor:
    """[S * B, C], as routers put it out, as [S, B, C]."""
    return values.view(-1, batch, values.shape[-1]) if values.dim() == 2 else values


def _channels(part: Tensor, place: Place, *, gated: bool) -> Tensor:
    """This tp rank's channels: [S, B, C] -> [S, B, C / tp]."""
    if not gated:
        return part.chunk(place.tp_size, 2)[place.tp]
    return torch.cat([half.chunk(place.tp_size, 2)[place.tp] for half in part.chunk(2, 2)], 2)
