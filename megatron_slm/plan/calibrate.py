"""From measurements of this machine to rates and a cluster description, with spread and provenance. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_slm.errors import ConfigError
from megatron_slm.plan.cluster import Cluster
from megatron_slm.plan.cost import GIGA, TERA
from megatron_slm.plan.fit import fitted, line, percentiles
from megatron_slm.plan.links import Span, ring_steps, volume
from megatron_slm.plan.rates import PUBLISHED, Rates, to_record

HEADROOM = 1.25
"""Where no data sheet gives a peak, it is taken as this many times the best that was measured; only its product with an
efficiency enters a plan."""

LATENCIES, BANDWIDTHS = ("nvlink_latency_seconds", "network_latency_seconds"), ("nvlink", "network")


class Measured(Protocol):
    """What is read of a measurement (``plan.measure.Sample``)."""

    @property
    def kind(self) -> str: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def ranks(self) -> int: ...
    @property
    def in_node(self) -> int: ...
    @property
    def median(self) -> float: ...


@dataclass(frozen=True)
class Machine:
    """What is known of the machine without measuring."""

    name: str
    gpus_per_node: int
    nodes: int
    memory_gib: float
    bf16_tflops: float | None = None
    """Data sheet; None where there is none."""


def calibrated(samples: Sequence[Measured], machine: Machine, *, provenance: str) -> tuple[Cluster, Rates]:
    """The machine as a cluster, and the rates that it reaches.

    Constants that nothing was measured for (links between nodes on a single one) keep the published value, and say so.

    Args:
        samples: of ``plan.measure``.
        provenance: host, versions and date, of everything that was measured.

    Raises:
        ConfigError: there are no products, or nothing that reads memory, among the samples.
    """
    by_kind: dict[str, list[Measured]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    if missing := [kind for kind in ("gemm", "streaming", "op", "attention") if kind not in by_kind]:
        raise ConfigError(f"no measurement of {', '.join(missing)} is there. Measure again.")
    best = max(_flops(sample) / sample.median for sample in by_kind["gemm"])
    peak = machine.bf16_tflops or HEADROOM * best / TERA
    streams = [sample.sizes[0] / sample.median / GIGA for sample in by_kind["streaming"]]
    cluster = Cluster(
        name=machine.name,
        nodes=machine.nodes,
        gpus_per_node=machine.gpus_per_node,
        memory_gib=machine.memory_gib,
        bf16_tflops=peak,
        memory_gb_per_second=HEADROOM * max(streams),
        **_bandwidths(by_kind),
        architecture="measured",
        source=provenance,
    )
    rates, spread = _kernel_rates(by_kind, cluster)
    links, link_spread = _link_rates(by_kind, cluster)
    known = {**rates, **links}
    origin = dict.fromkeys(known, f"measured: {provenance}")
    base = PUBLISHED["hopper"]
    kept = {name: f"not measured here; as on H100: {text}" for name, text in base.provenance.items()}
    start = dataclasses.replace(base, **known, provenance=kept | origin, spread=spread | link_spread)
    return cluster, _with_products(start, by_kind["gemm"], cluster, provenance)


def to_json_record(
    cluster: Cluster, rates: Rates, samples: Sequence[Measured], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file of rates holds: ``--rates`` reads ``cluster`` and ``rates``; the rest says where they come from."""
    return {
        "about": dict(about),
        "cluster": {name: value for name, value in dataclasses.asdict(cluster).items() if value is not None},
        "rates": to_record(rates),
        "measured": [
            {
                "kind": sample.kind,
                "sizes": list(sample.sizes),
                "median_seconds": sample.median,
                "ranks": sample.ranks,
                "in_node": sample.in_node,
            }
            for sample in samples
        ],
    }


def _flops(sample: Measured) -> float:
    """Of a matrix product, or of causal attention's forward pass."""
    if sample.kind == "gemm":
        m, n, k = sample.sizes
        return 2.0 * m * n * k
    length, heads, channels = sample.sizes
    return 4.0 * length * length * heads * channels / 2


def _kernel_rates(
    by_kind: Mapping[str, list[Measured]], cluster: Cluster
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Memory, attention and the start of a kernel."""
    streams = [
        sample.sizes[0] / sample.median / (cluster.memory_gb_per_second * GIGA) for sample in by_kind["streaming"]
    ]
    attention = [_flops(sample) / sample.median / (cluster.bf16_tflops * TERA) for sample in by_kind["attention"]]
    op = by_kind["op"][0].median
    rates = {
        "memory_efficiency": min(1.0, sorted(streams)[len(streams) // 2]),
        "attention_efficiency": min(1.0, attention[0]),
        "op_seconds": op,
    }
    return rates, {"memory_efficiency": percentiles(streams)}


def _with_products(rates: Rates, samples: Sequence[Measured], cluster: Cluster, provenance: str) -> Rates:
    """The rates with the two constants of matrix products fitted, and what each product alone would say."""
    peak = cluster.bf16_tflops * TERA

    def shape_share(found: Rates, sample: Measured) -> float:
        share = 1.0
        for side in sample.sizes:
            share *= side / (side + found.gemm_half_size)
        return share

    def loss(found: Rates) -> float:
        total = 0.0
        for sample in samples:
            seconds = _flops(sample) / (peak * found.gemm_efficiency * shape_share(found, sample)) + found.op_seconds
            total += abs(math.log(seconds / sample.median))
        return total / len(samples)

    found = fitted(rates, ("gemm_efficiency", "gemm_half_size"), loss, provenance=f"measured: {provenance}")
    alone = [
        _flops(sample) / (peak * shape_share(found, sample) * max(sample.median - found.op_seconds, 1e-9))
        for sample in samples
    ]
    return dataclasses.replace(found, spread={**found.spread, "gemm_efficiency": percentiles(alone)})


def _points(by_kind: Mapping[str, list[Measured]], *, between: bool) -> list[tuple[float, float]]:
    """(bytes on the link, seconds) of one step of a ring, for groups that lie on one kind of link alone."""
    found = []
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for sample in by_kind.get(kind, []):
            alone = sample.in_node == (1 if between else sample.ranks)
            if sample.ranks > 1 and alone:
                steps = ring_steps(kind, sample.ranks)
                sent = volume(kind, float(sample.sizes[0]), Span(sample.ranks, sample.in_node)).total
                found.append((sent / steps, sample.median / steps))
    return found


def _bandwidths(by_kind: Mapping[str, list[Measured]]) -> dict[str, float]:
    """Of the links, above what was measured; a link that was not measured is taken to be like the other one."""
    best = {}
    for name, between in zip(BANDWIDTHS, (False, True), strict=True):
        points = _points(by_kind, between=between)
        if points:
            best[name] = HEADROOM / line([x for x, _ in points], [y for _, y in points])[1] / GIGA
    both = {name: best.get(name) or max(best.values(), default=1.0) for name in BANDWIDTHS}
    return {f"{name}_gb_per_second": value for name, value in both.items()}


def _link_rates(
    by_kind: Mapping[str, list[Measured]], cluster: Cluster
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Latency and efficiency of every link that was measured."""
    rates: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    for name, latency, between in zip(BANDWIDTHS, LATENCIES, (False, True), strict=True):
        points = _points(by_kind, between=between)
        if not points:
            continue
        alpha, beta = line([x for x, _ in points], [y for _, y in points])
        peak = getattr(cluster, f"{name}_gb_per_second") * GIGA
        rates[latency], rates[f"{name}_efficiency"] = max(alpha, 1e-9), min(1.0, 1 / beta / peak)
        # Of the large messages, in which latency is little.
        large = [size / seconds / peak for size, seconds in points if seconds > 4 * alpha]
        spread[f"{name}_efficiency"] = percentiles(large or [1 / beta / peak])
    return rates, spread
