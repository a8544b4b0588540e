"""Rules about packages that are installed only where they are asked for. They are looked for, and not imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib import metadata

from megatron_slm.config.facts import Facts

LOADER, PORT, FILE, ADDRESS = "data.loader", "log.prometheus_port", "log.prometheus_file", "log.prometheus_address"
DALI = "nvidia-dali-cuda130==2.4.0"
PROMETHEUS = "prometheus-client==0.26.0"
STUB = "nvidia-dali"
"""A package on PyPI that holds a warning and no DALI."""


def installed(module: str) -> bool:
    """Whether ``module`` can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package it lies in is not there
        return False


def dali(facts: Facts) -> Iterator[str]:
    """DALI reads the text of pretraining, where it is installed."""
    if facts.config.data.loader != "dali":
        return
    if facts.config.stage != "pretrain":
        yield (
            f"{facts.cite(LOADER, 'stage')}: DALI's pipeline is written for the text of pretraining; the rows of the "
            f"other stages are read by torch. Set {LOADER}=torch."
        )
    if not installed("nvidia.dali"):
        yield (
            f"{facts.cite(LOADER)} needs NVIDIA DALI, which is not installed: {_without_stub()}pip install {DALI} "
            f"(PyPI's {STUB} is a stub without it). Or set {LOADER}=torch, which gives the same samples."
        )


def _without_stub() -> str:
    try:
        metadata.version(STUB)
    except metadata.PackageNotFoundError:
        return ""
    return f"pip uninstall {STUB}; "


def prometheus(facts: Facts) -> Iterator[str]:
    """Metrics for Prometheus need its library; an address is one of a port."""
    log = facts.config.log
    asked = [key for key, value in ((PORT, log.prometheus_port), (FILE, log.prometheus_file)) if value is not None]
    if asked and not installed("prometheus_client"):
        yield (
            f"{facts.cite(*asked)} needs the package prometheus_client, which is not installed: pip install "
            f"{PROMETHEUS}. Or leave {' and '.join(asked)} out."
        )
    if facts.is_set(ADDRESS) and log.prometheus_port is None:
        yield f"{facts.cite(ADDRESS)}: nothing listens there without a port. Set {PORT}, or leave {ADDRESS} out."


RULES = (dali, prometheus)
