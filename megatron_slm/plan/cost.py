"""Seconds of one operation: a roofline for kernels, latency and bandwidth for exchanges. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.cluster import Cluster
from megatron_slm.plan.links import Span, Volume, next_stage_crosses, ring_steps, span, volume
from megatron_slm.plan.ops import Attention, Exchange, Gemm, Op, Streaming
from megatron_slm.plan.rates import Rates

GIGA, TERA = 1e9, 1e12

FP8_SHARE = 0.85
"""What a product in FP8 reaches of its peak, over what the same product in bf16 reaches of bf16's. Fitted, with the
rates that bf16 runs gave, on 44 step times in FP8 on H100 of NVIDIA/dgxc-benchmarking v24.11.1, which it meets within
8.3 % on average (worst 29 %, of a mixture of experts); at 1.0 they are 11 % too fast. Blackwell's is assumed equal."""


@dataclass(frozen=True)
class Spent:
    """Seconds of some ops on one rank, and what of them is waiting for an exchange."""

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    volume: Volume = Volume()

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds, self.exposed_seconds + other.exposed_seconds, self.volume + other.volume
        )

    def __mul__(self, times: float) -> Spent:
        return Spent(self.seconds * times, self.exposed_seconds * times, self.volume * times)


@dataclass(frozen=True)
class Costs:
    """Prices of operations for one rank of one layout on one cluster."""

    cluster: Cluster
    rates: Rates
    layout: Layout
    rank: int = 0

    def of(self, ops: Iterable[Op]) -> Spent:
        """All of them, one after another but for exchanges beside a kernel; no faster than the CPU starts them."""
        total, exposed, started, sent = 0.0, 0.0, 0, Volume()
        for op in ops:
            started += 1
            if isinstance(op, Exchange):
                waited = self.exposed_seconds(op)
                total, exposed, sent = total + waited, exposed + waited, sent + self.volume(op)
            else:
                total += self.kernel_seconds(op)
        return Spent(max(total, started * self.rates.host_seconds), exposed, sent)

    def kernel_seconds(self, op: Gemm | Attention | Streaming) -> float:
        """The longer of computing and moving bytes, and the start of the kernel."""
        moving = self.streaming_seconds(op.bytes)
        if isinstance(op, Gemm):
            moving = max(moving, op.flops / (self._peak_tflops(op) * TERA * self.gemm_efficiency(op)))
        elif isinstance(op, Attention):
            moving = max(moving, op.flops / (self.cluster.bf16_tflops * TERA * self.rates.attention_efficiency))
        return moving + self.rates.op_seconds

    def _peak_tflops(self, op: Gemm) -> float:
        """Of the format that a product has; of FP8's, :data:`FP8_SHARE`."""
        if not op.fp8 or self.cluster.fp8_tflops is None:
            return self.cluster.bf16_tflops
        return FP8_SHARE * self.cluster.fp8_tflops

    def gemm_efficiency(self, op: Gemm) -> float:
        """Share of the peak: every side below endless costs its part, as partly filled tiles and short sums do."""
        half, share = self.rates.gemm_half_size, self.rates.gemm_efficiency
        for side in (op.m, op.n, op.k):
            share *= side / (side + half)
        return share

    def streaming_seconds(self, moved_bytes: float) -> float:
        """Of reading and writing GPU memory."""
        return moved_bytes / (self.cluster.memory_gb_per_second * GIGA * self.rates.memory_efficiency)

    def exposed_seconds(self, op: Exchange) -> float:
        """What an exchange is waited for: all of it, or what is left beside the kernel it hides behind."""
        seconds = self.exchange_seconds(op.collective, op.bytes, self.span(op.axis))
        hidden = 0.0 if op.behind is None else self.kernel_seconds(op.behind)
        return max(0.0, seconds - hidden) * op.times

    def volume(self, op: Exchange) -> Volume:
        """Bytes that this rank sends for an exchange."""
        return volume(op.collective, op.bytes, self.span(op.axis)) * op.times

    def span(self, axis: str) -> Span:
        """This rank's group on an axis."""
        return span(self.layout, axis, self.rank, self.cluster.gpus_per_node)

    def exchange_seconds(self, collective: str, message_bytes: float, group: Span) -> float:
        """Alpha-beta: steps of the ring (or partners) x latency, and the slower of the two links' bytes."""
        if group.size == 1:
            return 0.0
        sent = volume(collective, message_bytes, group)
        steps = ring_steps(collective, group.size)
        latency = self.rates.network_latency_seconds if group.crosses else self.rates.nvlink_latency_seconds
        return steps * latency + max(sent.inside / self._bandwidth(False), sent.between / self._bandwidth(True))

    def send_seconds(self, message_bytes: float) -> float:
        """Of one message to the next pipeline stage."""
        crosses = next_stage_crosses(self.layout, self.rank, self.cluster.gpus_per_node)
        latency = self.rates.network_latency_seconds if crosses else self.rates.nvlink_latency_seconds
        return latency + message_bytes / self._bandwidth(crosses)

    def send_volume(self, message_bytes: float) -> Volume:
        """Bytes of one message to the next pipeline stage, on its link."""
        if next_stage_crosses(self.layout, self.rank, self.cluster.gpus_per_node):
            return Volume(between=message_bytes)
        return Volume(inside=message_bytes)

    def _bandwidth(self, between: bool) -> float:
        if between:
            return self.cluster.network_gb_per_second * GIGA * self.rates.network_efficiency
        return self.cluster.nvlink_gb_per_second * GIGA * self.rates.nvlink_efficiency
