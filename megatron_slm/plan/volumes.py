"""Bytes that one rank sends in one step, by axis, collective and link, as a hand count gives them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_slm.plan.links import Volume
from megatron_slm.plan.ops import ELEMENT, FP8_ELEMENT, Exchange
from megatron_slm.plan.predict import Question, chunk_passes, micro_batches, send_bytes
from megatron_slm.plan.weights import Weights, stage_weights


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange of one rank in one step."""

    axis: str
    collective: str
    times: int
    message_bytes: float
    """Of all of them together: S of the usual volume formulas (``plan.ops.Exchange``)."""
    sent: Volume

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.axis,
            self.collective,
            self.times + other.times,
            self.message_bytes + other.message_bytes,
            self.sent + other.sent,
        )


def traffic(question: Question, stage: int = 0) -> list[Traffic]:
    """Everything the first rank of a pipeline stage sends in one step, one entry for each axis and collective."""
    found: dict[tuple[str, str], Traffic] = {}
    for entry in [*_in_layers(question, stage), *_to_neighbours(question, stage), *_to_replicas(question, stage)]:
        key = (entry.axis, entry.collective)
        found[key] = found[key] + entry if key in found else entry
    return [entry for entry in found.values() if entry.sent.total]


def by_link(entries: list[Traffic]) -> Volume:
    """All of it, by link."""
    return sum((entry.sent for entry in entries), Volume())


def _in_layers(question: Question, stage: int) -> Iterator[Traffic]:
    """Over tp, cp, ep and etp: the same for every micro-batch."""
    costs, repeats = question.costs(stage), micro_batches(question)
    for chunk in chunk_passes(question)[stage]:
        for each, count in chunk:
            for op in (*each.forward, *each.backward):
                if isinstance(op, Exchange):
                    times = count * repeats
                    sent = costs.volume(op) * times
                    yield Traffic(op.axis, op.collective, op.times * times, op.times * times * op.bytes, sent)


def _to_neighbours(question: Question, stage: int) -> Iterator[Traffic]:
    """Outputs to the next chunk of the model, gradients to the previous one."""
    layout = question.layout
    stages, chunks, repeats = layout.pipeline_model_parallel_size, layout.vpp_size, micro_batches(question)
    if stages == 1:
        return
    size = send_bytes(question)
    onward = chunks - (stage == stages - 1)  # the model's last chunk has no next one
    back = chunks - (stage == 0)
    for times, sender in ((onward * repeats, stage), (back * repeats, (stage - 1) % stages)):
        # A gradient goes back over the link on which the output came.
        yield Traffic("pp", "send", times, times * size, question.costs(sender).send_volume(size) * times)


def _to_replicas(question: Question, stage: int) -> Iterator[Traffic]:
    """Gradients and parameters, once a step."""
    weights, costs = sum(stage_weights(question.config)[stage], Weights()), question.costs(stage)
    size = question.kernels.gradient_bytes
    sharded = question.config.parallel.use_distributed_optimizer
    element = FP8_ELEMENT if question.config.precision.fp8_param_gather else ELEMENT
    exchanges = [("reduce_scatter", size), ("all_gather", element)] if sharded else [("all_reduce", size)]
    for axis, elements in (("dp-cp", weights.dense), ("edp", weights.expert)):
        for collective, each in exchanges:
            op = Exchange(axis, collective, axis, float(each * elements))
            yield Traffic(axis, collective, 1 if elements else 0, op.bytes, costs.volume(op))
