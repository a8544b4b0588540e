"""Every stage's loss on two context-parallel ranks, which hold two pieces of every sequence each, against one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.parallel import context
from megatron_slm.stages.segments import Logs
from tests.ranks import run_ranks
from tests.stage_batches import LOSSES, made

RANKS = 2


def on_rank() -> dict[str, tuple[Tensor, Tensor, Logs]]:
    """Of each loss: this rank's gradient, denominator and logs."""
    import torch.distributed as dist

    found = {}
    for name in LOSSES:
        whole = made(name)
        part = context.cut(whole.output, whole.output.dim() - 1, dist.get_rank(), RANKS).clone().requires_grad_()
        batch = context.cut_batch(whole.batch, dist.get_rank(), RANKS)
        total, count, logs = whole(part, batch, dist.group.WORLD)
        (gradient,) = torch.autograd.grad(total, part)
        found[name] = gradient, count, logs
    return found


def test_two_parts_of_a_sequence_are_the_sequence() -> None:
    ranks = run_ranks(on_rank, RANKS)
    for name in LOSSES:
        whole = made(name)
        output = whole.output.clone().requires_grad_()
        total, count, logs = whole(output)
        (expected,) = torch.autograd.grad(total, output)
        parts = [rank[name] for rank in ranks]
        joined = context.join([part[0] for part in parts], expected.dim() - 1)
        assert torch.allclose(joined, expected, rtol=1e-12, atol=1e-15), name
        assert sum(int(part[1]) for part in parts) == int(count), name
        for key, pair in logs.items():
            assert torch.allclose(sum(part[2][key] for part in parts), pair, rtol=1e-12), (name, key)
