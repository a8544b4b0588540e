"""What part of a data sheet's numbers a program reaches: a few constants, each with where it comes from. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Constants of the cost model (``plan.cost``). Efficiencies are shares of the cluster's own numbers."""

    gemm_efficiency: float
    """Of the peak, in an endless matrix product."""
    gemm_half_size: float
    """A product with one side of this length reaches half of that."""
    attention_efficiency: float
    """Of the peak, in fused attention's own FLOPs."""
    memory_efficiency: float
    """Of the memory bandwidth, in element-wise kernels."""
    nvlink_efficiency: float
    """Of the bandwidth inside a node, in a ring."""
    network_efficiency: float
    """Of the bandwidth between nodes, in a ring."""
    nvlink_latency_seconds: float
    """Of one step of a ring inside a node."""
    network_latency_seconds: float
    """Of one step of a ring between nodes."""
    op_seconds: float
    """Between two ops on the GPU."""
    host_seconds: float
    """Of the CPU for one op (several kernels): a pass takes no less than all of them."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Constant -> where it comes from."""
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Constant -> 10th and 90th percentile of the single measurements, where it was measured."""


def constants() -> list[str]:
    """Names of the fitted numbers."""
    return [name.name for name in dataclasses.fields(Rates) if name.name not in ("provenance", "spread")]


_SPECIFIED = ("gemm_efficiency", "gemm_half_size", "attention_efficiency", "memory_efficiency")
_LINKS = ("nvlink_efficiency", "network_efficiency", "op_seconds", "host_seconds")
_ASSUMED = "assumed: a few microseconds for a step of an NCCL ring"


def _fitted(origin: str, **other: str) -> Mapping[str, str]:
    """Provenance of constants that were fitted together; ``other`` where one differs."""
    latencies = dict.fromkeys(("nvlink_latency_seconds", "network_latency_seconds"), _ASSUMED)
    return MappingProxyType(dict.fromkeys((*_SPECIFIED, *_LINKS), f"fitted on {origin}") | latencies | other)


# Mean absolute relative error, each table weighted alike, plus a weak pull to 0.78 (Ampere) or 0.70 of the peak in
# products, a half size of 64, 0.8 of the memory, 0.7 of NVLink, 0.8 of the network, 5 and 50 us: a constant that a
# table says little of stays near these.
PUBLISHED: Mapping[str, Rates] = MappingProxyType(
    {
        "ampere": Rates(
            gemm_efficiency=0.749,
            gemm_half_size=100,
            attention_efficiency=0.387,
            memory_efficiency=0.766,
            nvlink_efficiency=0.802,
            network_efficiency=0.615,
            nvlink_latency_seconds=3e-6,
            network_latency_seconds=1e-5,
            op_seconds=5.95e-6,
            host_seconds=4.54e-5,
            provenance=_fitted(
                "10 step times of arXiv 2104.04473 table 1 and 62 of vTrain (MICRO 2024), all with full recomputation",
                attention_efficiency="fitted, apart from the others, on those and on AlephLayouts (FlashAttention "
                "2, 32 and 64 GPUs)",
            ),
        ),
        "hopper": Rates(
            gemm_efficiency=0.581,
            gemm_half_size=72,
            attention_efficiency=0.637,
            memory_efficiency=0.793,
            nvlink_efficiency=0.703,
            network_efficiency=0.858,
            nvlink_latency_seconds=3e-6,
            network_latency_seconds=1e-5,
            op_seconds=5.13e-6,
            host_seconds=5.22e-5,
            provenance=_fitted("35 bf16 step times of dense models on H100 in NVIDIA/dgxc-benchmarking v24.11.1"),
        ),
        "blackwell": Rates(
            gemm_efficiency=0.439,
            gemm_half_size=73.6,
            attention_efficiency=0.405,
            memory_efficiency=0.770,
            nvlink_efficiency=0.493,
            network_efficiency=0.819,
            nvlink_latency_seconds=3e-6,
            network_latency_seconds=1e-5,
            op_seconds=7.28e-6,
            host_seconds=4.05e-5,
            provenance=_fitted(
                "19 bf16 step times of dense models on one node of B200 in MooreThreads/SimuMax v1.2",
                network_efficiency="assumed: no run left its node",
            ),
        ),
    }
)
"""Architecture of a cluster's GPUs -> rates."""


def rates_of(architecture: str, file: Path | None = None) -> Rates:
    """Published rates, or those that ``mslm plan calibrate`` has written.

    Raises:
        ConfigError: neither is there, or the file holds something else.
    """
    if file is not None:
        return from_record(_read(file).get("rates"), str(file))
    if architecture not in PUBLISHED:
        raise ConfigError(
            f"architecture {architecture}: rates are known for {', '.join(PUBLISHED)}. Name one of them in the "
            "cluster's file, or measure: mslm plan calibrate --output rates.json, then --rates rates.json."
        )
    return PUBLISHED[architecture]


def cluster_record(file: Path) -> dict[str, Any] | None:
    """The cluster that was measured along with the rates of a file, as keys of a cluster description."""
    found = _read(file).get("cluster")
    return found if isinstance(found, dict) else None


def to_record(rates: Rates) -> dict[str, Any]:
    """The rates as JSON values; :func:`from_record` reads them back."""
    record: dict[str, Any] = {name: getattr(rates, name) for name in constants()}
    record["provenance"] = dict(rates.provenance)
    record["spread"] = {name: list(ends) for name, ends in rates.spread.items()}
    return record


def from_record(record: Any, origin: str) -> Rates:
    """The rates of a JSON object.

    Raises:
        ConfigError: a constant is missing or no number above 0; the message names ``origin``.
    """
    if not isinstance(record, dict):
        raise ConfigError(f"{origin} holds no rates. Write one with mslm plan calibrate --output {origin}.")
    for name in constants():
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{origin}: rates.{name} = {value!r} must be a number above 0. Measure again.")
    provenance, spread = record.get("provenance", {}), record.get("spread", {})
    return Rates(
        **{name: float(record[name]) for name in constants()},
        provenance={str(name): str(text) for name, text in provenance.items()} if isinstance(provenance, dict) else {},
        spread={str(name): (float(ends[0]), float(ends[1])) for name, ends in spread.items()}
        if isinstance(spread, dict)
        else {},
    )


def _read(file: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rates {file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--rates {file} must hold a JSON object, as mslm plan calibrate writes it.")
    return found
