"""Do packed documents see each other? Tried on every pipeline stage before a run begins.

A stage that has lost ``document_ids`` attends over the borders of documents; the loss looks normal and the model is
worse. So one packed micro-batch is run twice, the second time with other tokens in the first document of every row: in
no layer stack of any stage may the hidden state of another document differ by a single bit.

Shapes: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.context import cut
from megatron_slm.parallel.pipeline import Batch, run_schedule


def require_isolation(
    chunks: list[nn.Module], batch: Batch, *, seq_length: int, groups: Any, tolerance: float = 0.0
) -> bool:
    """Refuse a model in which documents of one row see each other. Collective; weights and random states stay as they
    are.

    Args:
        batch: a micro-batch as the schedule takes it: tensors [B, S/cp], ``document_ids`` [B, S] on the host.
        tolerance: how far other documents may move, as a share of the largest hidden state: 0 but where documents share
            a matrix product whose shape they change, as tokens routed to one expert do.

    Returns:
        Whether there was something to try: a row with two documents and two different tokens.

    Raises:
        ConfigError: some stage mixes documents, or sees no difference in the changed one either; names the first stage.
    """
    changed, first = _perturbed(batch, groups)
    if changed is None:
        return False
    before = _hidden_states(chunks, batch, seq_length, groups)
    after = _hidden_states(chunks, changed, seq_length, groups)
    # By stage in the order of the model: how far the first document moved, how far others did.
    moved = torch.zeros(groups.pp.size() * len(chunks), 2, dtype=torch.float64)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        mine = _local(first.T, one.shape[0], groups)
        distance = (one.double() - other.double()).abs().amax(dim=-1).cpu() / one.double().abs().max().clamp(
            min=1e-30
        ).cpu()
        stage = number * groups.pp.size() + groups.pp.rank()
        moved[stage, 0] = torch.where(mine, distance, 0.0).max()
        moved[stage, 1] = torch.where(mine, 0.0, distance).max()
    moved = moved.to(batch["tokens"].device)
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    _judge(moved.tolist(), tolerance)
    return True


def _judge(moved: list[list[float]], tolerance: float) -> None:
    """Of every stage: how far the changed document moved, and others."""
    for stage, (own, others) in enumerate(moved):
        where = f"pipeline stage {stage} of {len(moved)} (counted from 0, in the order of the model)"
        if not own > 0.0:
            raise ConfigError(
                f"It cannot be told whether packed documents see each other: other tokens change nothing on {where}."
            )
        if not others <= tolerance:
            raise ConfigError(
                f"Packed documents see each other on {where}: other tokens in one document move the hidden states of "
                f"its neighbours by {others:.1e} of the largest, so document_ids do not reach its attention. Set "
                "data.pack_rows=false to train with one example a row."
            )


def _perturbed(batch: Batch, groups: Any) -> tuple[Batch | None, Tensor]:
    """``batch`` with other tokens in the first document of each row, and bool [B, S/cp] where those are; None where no
    row has another document, or there is one token alone.
    """
    documents = batch["document_ids"]
    whole = documents == documents[:, :1]
    first = cut(whole, 1, groups.cp.rank(), groups.cp.size()) if groups.cp.size() > 1 else whole
    tokens = batch["tokens"]
    lowest, highest = tokens.min(), tokens.max()
    if groups.cp.size() > 1:
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=groups.cp)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=groups.cp)
    possible = (~whole).any() & (lowest < highest).cpu()
    possible = possible.to(tokens.device, torch.int)
    dist.all_reduce(possible, op=dist.ReduceOp.MIN)
    if not bool(possible):
        return None, first
    other = torch.where(tokens == lowest, highest, lowest)
    return {**batch, "tokens": torch.where(first.to(tokens.device), other, tokens)}, first


def _hidden_states(chunks: list[nn.Module], batch: Batch, seq_length: int, groups: Any) -> list[Tensor]:
    """What the layers of each chunk of this rank make of ``batch``: [S/cp or S/(cp tp), B, H]."""
    found: list[list[Tensor]] = [[] for _ in chunks]

    def keep(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[place].append((output[0] if isinstance(output, tuple) else output).detach().clone())

        return hook

    hooks = [
        get_attr_wrapped_model(chunk, "decoder").register_forward_hook(keep(place))
        for place, chunk in enumerate(chunks)
    ]
    # An interleaved schedule asks for a multiple of the pipeline's size.
    count = groups.pp.size() if len(chunks) > 1 else 1
    try:
        with _evaluating(chunks), torch.no_grad():
            run_schedule(chunks, [batch] * count, _no_loss, forward_only=True, seq_length=seq_length, groups=groups)
    finally:
        for each in hooks:
            each.remove()
    return [states[0] for states in found]


@contextmanager
def _evaluating(chunks: list[nn.Module]) -> Iterator[None]:
    """Without dropout."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def _no_loss(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return output.sum().clone(), torch.ones((), dtype=torch.int, device=output.device), {}


def _local(of_sequence: Tensor, length: int, groups: Any) -> Tensor:
    """[S/cp, B] -> [length, B]: this tp rank's part where the sequence is cut over tp."""
    if length == of_sequence.shape[0]:
        return of_sequence
    return of_sequence.chunk(groups.tp.size())[groups.tp.rank()]
