"""The cross-entropies of published Megatron runs in the dry world; a run of ours has ``parallel/vocab_loss.py``.

Read from NVIDIA/TransformerEngine v2.11, ``pytorch/{cross_entropy,triton/cross_entropy}.py`` ("te"), and core 0.16.1,
``fusions/fused_cross_entropy.py`` ("core"), which is run as it is, but for what torch.compile makes of it.

Shapes: S sequence, B batch, V_l vocabulary of this tp rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_slm.parallel.declared_ops import KERNELS, kernel, torch_workspace


class CrossEntropy(torch.autograd.Function):
    """``CrossEntropyFunction``: the gradient overwrites the logits, which are all that is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        rows = labels.numel()
        losses = logits.new_empty(rows, dtype=torch.float32)
        sums = logits.new_empty(rows * 3, dtype=torch.float32)
        if group.size() > 1:
            whole = logits.new_empty(rows * 3 * group.size(), dtype=torch.float32)
            dist.all_gather_into_tensor(whole, sums, group=group)
        kernel("memory", [logits, labels], [losses, sums])
        kernel("memory", [logits, labels], [losses, logits])
        ctx.save_for_backward(logits.detach())
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        kernel("memory", [gradient, grad_output.contiguous()], [gradient])
        return gradient, None, None


def parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """Losses [S, B] in fp32 of logits [S, B, V_l] and labels [S, B]."""
    losses: Tensor = CrossEntropy.apply(logits, labels, group)
    return losses


def use_loss(chunks: Sequence[nn.Module]) -> None:
    """Let the last of a rank's chunks end as the program does that ``declared_kernels`` was told of.

    Ours stays as it is. A published run makes logits and then the losses: "core" unfused, "core fused", or "te".

    Args:
        chunks: unwrapped models, as built.
    """
    loss = KERNELS.get().loss
    for chunk in chunks:
        layer: Any = getattr(chunk, "output_layer", None)
        if layer is not None:
            held: list[Tensor] = []
            layer.forward = partial(_ours if loss == "ours" else LOSSES[loss], layer, held)
            # As local variables of core's ``GPTModel._postprocess``, all logits live until it returns.
            chunk.register_forward_hook(lambda *_, held=held: held.clear())


def _ours(layer: Any, held: list[Tensor], hidden: Tensor, *rest: Any, **options: Any) -> Any:
    torch_workspace(hidden)
    return type(layer).forward(layer, hidden, *rest, **options)


def _ending(function: Any) -> Any:
    def forward(
        layer: Any,
        held: list[Tensor],
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        ending: Any = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> Any:
        torch_workspace(hidden)
        logits, bias = ColumnParallelLinear.forward(layer, hidden, weight, runtime_gather_output)
        if fields is None:
            return logits, bias
        labels, loss_mask = fields["labels"], fields["loss_mask"]
        held.append(logits)
        # As core's ``compute_language_model_loss`` and Megatron's ``loss_func``: [B, S] -> [S, B] and back.
        losses = function(logits, labels.transpose(0, 1).contiguous(), layer.tp_group).transpose(0, 1).contiguous()
        total = (losses.view(-1).float() * loss_mask.view(-1)).sum()
        return torch.stack([total, total.detach(), total.detach()])

    return forward


def compiled_cross_entropy(logits: Tensor, labels: Tensor, group: Any) -> Tensor:
    """Core's fused losses, compiled: the exponentials have a buffer of their own before they overwrite the logits."""
    exponentials = torch.empty_like(logits, dtype=torch.float32)
    losses: Tensor = fused_vocab_parallel_cross_entropy(logits, labels, group)
    del exponentials
    return losses


LOSSES = {
    "te": _ending(parallel_cross_entropy),
    "core": _ending(lambda logits, labels, group: vocab_parallel_cross_entropy(logits, labels)),
    "core fused": _ending(compiled_cross_entropy),
}
