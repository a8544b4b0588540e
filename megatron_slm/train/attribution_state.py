"""What is not finite without a computation: weights, optimizer states, inputs, and the gradients of a bad step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.train.attribution_event import INPUT, STATE, Event, count_nonfinite
from megatron_slm.train.optimizer_state import Master, inner_optimizers, named_masters, named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def stage_of(chunk: int, groups: Any) -> int:
    """Place of a rank's model chunk in the pipeline of all chunks."""
    return int(chunk * groups.pp.size() + groups.pp.rank())


def placed_parameters(chunks: Sequence[nn.Module], groups: Any) -> Iterator[tuple[tuple[int, int], str, nn.Parameter]]:
    """(place in the order of the model, global name, parameter) of every parameter of this rank."""
    for index, chunk in enumerate(chunks):
        for number, (name, param) in enumerate(named_parameters([chunk])):
            yield (stage_of(index, groups), number), name, param


def bad_state(chunks: Sequence[nn.Module], optimizer: Any, groups: Any) -> list[Event]:
    """Weights that are not finite; in place of a weight, the optimizer state that the last update made it from.

    Moments do nothing to a step before its update: they are to blame where they have spoilt a weight already.
    """
    masters: dict[nn.Parameter, Master] = {master.param: master for master in named_masters(optimizer, list(chunks))}
    events = []
    for place, name, param in placed_parameters(chunks, groups):
        bad = count_nonfinite(param)
        if not bad:
            continue
        module, _, kind = name.rpartition(".")
        source = _bad_optimizer_state(masters[param], optimizer) if param in masters else None
        if source is None:
            phase, order, found = "parameter", (STATE, 1, *place), (kind, bad, param.numel())
        else:
            phase, order, found = "optimizer state", (STATE, 0, *place), (f"{source[0]} of the {kind}", *source[1:])
        tensor, nonfinite, total = found
        events.append(Event(order=order, phase=phase, module=module, tensor=tensor, nonfinite=nonfinite, total=total))
    return sorted(events, key=lambda event: event.order)


def _bad_optimizer_state(master: Master, optimizer: Any) -> tuple[str, int, int] | None:
    """(name, bad elements, elements) of the state behind a weight; None if the weight was spoilt by itself.

    A negative second moment is as bad as NaN: AdamW takes its root.
    """
    for inner in inner_optimizers(optimizer):
        values = inner.optimizer.state.get(master.tensor, {})
        for moment in (name for name in MOMENTS if name in values):
            bad = torch.isfinite(values[moment]).logical_not()
            if moment == "exp_avg_sq":
                bad |= values[moment] < 0
            if bad.any():
                return moment, int(bad.sum()), bad.numel()
    if master.tensor.untyped_storage().data_ptr() != master.param.untyped_storage().data_ptr():
        nonfinite = count_nonfinite(master.tensor)
        if nonfinite:
            return "master copy", nonfinite, master.tensor.numel()
    return None


def bad_inputs(micro_batches: Sequence[Batch]) -> list[Event]:
    """Tensors of the micro-batches that are not finite."""
    return [
        Event(
            order=(INPUT, number),
            phase="input",
            module=name,
            tensor=name,
            nonfinite=nonfinite,
            total=tensor.numel(),
            micro_batch=number,
        )
        for number, batch in enumerate(micro_batches)
        for name, tensor in batch.items()
        if (nonfinite := count_nonfinite(tensor))
    ]


def bad_gradients(chunks: Sequence[nn.Module], number: int, phase: str, word: str) -> list[Event]:
    """Gradient buffers that are not finite, as events of that number and phase, tied embeddings behind the others."""
    events = []
    for name, param in named_parameters(list(chunks)):
        nonfinite = count_nonfinite(param.main_grad) if hasattr(param, "main_grad") else 0
        if nonfinite:
            module, _, kind = name.rpartition(".")
            events.append(
                Event(
                    # The pipeline stages exchange the gradient of a tied embedding: it says little of where it arose.
                    order=(number, int(getattr(param, "shared_embedding", False))),
                    phase=phase,
                    module=module,
                    tensor=f"{word} of the {kind}",
                    nonfinite=nonfinite,
                    total=param.numel(),
                )
            )
    return events


def largest_gradient(chunks: Sequence[nn.Module]) -> tuple[float, str]:
    """(sum of squares in float64, name) of the largest gradient in the buffers."""
    found = [
        (float(squares_of(param.main_grad)), name)
        for name, param in named_parameters(list(chunks))
        if hasattr(param, "main_grad")
    ]
    return max(found, default=(0.0, ""))


def squares_of(tensor: Tensor) -> Tensor:
    """Sum of squares, scalar in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
