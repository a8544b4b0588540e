"""RMSNorm and LayerNorm that work under sequence parallelism (core's torch norm refuses it).

Shapes: S sequence (local: S / tp under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """The norm ``config.normalization`` names. Input and output [S, B, H], local along S.

    Each tp rank normalises its own part of the sequence, so its gradient of ``weight`` is a partial sum; the mark
    ``sequence_parallel`` makes core's ``finalize_model_grads`` add the parts.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.centered = config.normalization == "LayerNorm"
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if self.centered:
            self.bias = nn.Parameter(torch.zeros_like(self.weight))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; statistics in fp32 for half formats (torch's kernels do this inside)."""
        if self.centered:
            return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)


class ApexNorm(Norm):
    """The same by NVIDIA apex's kernels, forward and backward in one each; its parameters are those of ``Norm``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; statistics in fp32 for half formats."""
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

        if self.centered:
            normalised: Tensor = fused_layer_norm_affine(x, self.weight, self.bias, (self.hidden_size,), self.eps)
        else:
            normalised = fused_rms_norm_affine(x, self.weight, (self.hidden_size,), self.eps)
        return normalised
