"""What a cluster can do at best: the data-sheet numbers of its GPUs and links. No torch.

What part of them a program reaches is said by :class:`megatron_slm.plan.rates.Rates`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from megatron_slm.errors import ConfigError
from megatron_slm.memory.capacity import GIB, SEEN_BY_TORCH_BYTES


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal GPUs in equal nodes. A node is what shares one NVLink domain; network is what leaves it."""

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    memory_gib: float
    """Of one GPU as torch sees it, which is less than its name says."""
    bf16_tflops: float
    """Dense tensor-core peak, without 2:4 sparsity."""
    fp8_tflops: float | None = None
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    """Of one GPU in one direction; GB is 1e9 bytes."""
    network_gb_per_second: float
    """Between nodes, of one GPU in one direction."""
    architecture: str
    """Which fitted rates belong to it (``plan.rates.PUBLISHED``)."""
    source: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float):
                continue
            if isinstance(value, bool) or not 0 < value < math.inf:  # nan is refused too
                raise ConfigError(f"cluster {self.name}: {field.name} = {value}, but it must be a number above 0.")

    @property
    def gpus(self) -> int:
        """Ranks of a job that takes all of it."""
        return self.nodes * self.gpus_per_node

    @property
    def memory_bytes(self) -> float:
        """Of one GPU."""
        return self.memory_gib * GIB

    def of_gpus(self, gpus: int) -> Cluster:
        """The part of it that ``gpus`` ranks take: whole nodes, or a piece of one.

        Raises:
            ConfigError: the number is neither.
        """
        if gpus < 1 or (gpus > self.gpus_per_node and gpus % self.gpus_per_node):
            below = gpus // self.gpus_per_node * self.gpus_per_node
            raise ConfigError(
                f"{gpus} GPUs are no whole nodes of {self.gpus_per_node} ({self.name}). Nearest valid number: "
                f"{f'{below} or ' if below else ''}{below + self.gpus_per_node}."
            )
        if gpus < self.gpus_per_node:
            return dataclasses.replace(self, nodes=1, gpus_per_node=gpus)
        return dataclasses.replace(self, nodes=gpus // self.gpus_per_node)


_OOM = "memory as memory/capacity.py has it"
_DGXC = "NVIDIA/dgxc-benchmarking README, table of reference systems"
_A100 = "arXiv 2205.05198 section 6 (8 x 200 Gb/s HDR)"
_ESTIMATED = "memory: nominal GB x 0.991, the share that torch sees of B200 and GB200, not read off one"


def _preset(name: str, architecture: str, source: str, **values: Any) -> Cluster:
    """A cluster of the GPU that ``memory/capacity.py`` knows by the same name, or of ``memory_gib``."""
    seen = SEEN_BY_TORCH_BYTES[name] / GIB if name in SEEN_BY_TORCH_BYTES else values.pop("memory_gib")
    return Cluster(name=name, architecture=architecture, source=source, memory_gib=seen, **values)


_AMPERE = {"bf16_tflops": 312, "nvlink_gb_per_second": 300, "network_gb_per_second": 25}
_HOPPER = {"bf16_tflops": 989, "fp8_tflops": 1979, "nvlink_gb_per_second": 450, "network_gb_per_second": 50}
_B200 = {"bf16_tflops": 2250, "fp8_tflops": 4500, "memory_gb_per_second": 7700, "nvlink_gb_per_second": 900}
_GB200 = {"bf16_tflops": 2450, "fp8_tflops": 4900, "memory_gb_per_second": 8000, "nvlink_gb_per_second": 900}

CLUSTERS: Mapping[str, Cluster] = MappingProxyType(
    {
        cluster.name: cluster
        for cluster in (
            _preset("a100-40gb", "ampere", f"llm-analysis; {_A100}; {_OOM}", memory_gb_per_second=1555, **_AMPERE),
            _preset("a100-80gb", "ampere", f"llm-analysis; {_A100}; {_OOM}", memory_gb_per_second=2039, **_AMPERE),
            _preset("h100-80gb", "hopper", f"llm-analysis; {_DGXC}; {_OOM}", memory_gb_per_second=3350, **_HOPPER),
            _preset("h200", "hopper", f"MLPerf Inference v4.1; {_OOM}", memory_gb_per_second=4800, **_HOPPER),
            _preset("b200", "blackwell", f"{_DGXC}; {_OOM}", network_gb_per_second=50, **_B200),
            _preset(
                "gb200",
                "blackwell",
                f"{_DGXC}; MLPerf Inference v6.1, Crusoe GB200 (network); {_OOM}",
                gpus_per_node=72,
                network_gb_per_second=50,
                **_GB200,
            ),
            _preset(
                "b300", "blackwell", f"{_DGXC}; {_ESTIMATED}", memory_gib=267.5, network_gb_per_second=100, **_B200
            ),
            _preset(
                "gb300",
                "blackwell",
                f"{_DGXC}; {_ESTIMATED}",
                memory_gib=276.5,
                gpus_per_node=72,
                network_gb_per_second=100,
                **_GB200,
            ),
        )
    }
)
"""Name -> one node. The number of nodes comes from the job."""

ALIASES: Mapping[str, str] = MappingProxyType({"a100": "a100-80gb", "h100": "h100-80gb"})


def cluster_of(name: str) -> Cluster:
    """A preset, or the cluster that a YAML file describes with the fields of :class:`Cluster`.

    A file may start from a preset: ``like: h100`` and what differs.

    Raises:
        ConfigError: there is neither, or the file does not describe one.
    """
    if (known := CLUSTERS.get(ALIASES.get(name, name))) is not None:
        return known
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--cluster {name}: there is no such cluster and no such file. The clusters are {', '.join(CLUSTERS)}; or "
            "name a YAML file (docs/plan.md)."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value lines; the keys are {', '.join(_keys())}.")
    return from_values(values, str(path))


def from_values(values: Mapping[str, Any], origin: str) -> Cluster:
    """The cluster that ``values`` (field -> value, and perhaps ``like``) describe.

    Raises:
        ConfigError: a field is unknown, missing or of the wrong type; the message names ``origin``.
    """
    own = {str(key): value for key, value in values.items()}
    like = own.pop("like", None)
    like = ALIASES.get(like, like)
    if like is not None and like not in CLUSTERS:
        raise ConfigError(f"{origin}: like = {like} is no known cluster; they are {', '.join(CLUSTERS)}.")
    if unknown := [key for key in own if key not in _keys()]:
        raise ConfigError(f"{origin}: {', '.join(unknown)} is no key of a cluster; the keys are {', '.join(_keys())}.")
    base = dataclasses.asdict(CLUSTERS[like]) if like else {"name": Path(origin).stem}
    merged = base | own
    required = [field.name for field in dataclasses.fields(Cluster) if field.default is dataclasses.MISSING]
    if missing := [key for key in required if key not in merged]:
        raise ConfigError(f"{origin}: {', '.join(missing)} is missing. Give it, or `like: NAME` of a known cluster.")
    for field in dataclasses.fields(Cluster):
        _check(field.name, str(field.type), merged.get(field.name, field.default), origin)
    return Cluster(**merged)


def _keys() -> list[str]:
    return ["like", *(field.name for field in dataclasses.fields(Cluster))]


def _check(key: str, declared: str, value: Any, origin: str) -> None:
    """Refuse a value of another type than the field's."""
    wanted: Any = {"str": str, "int": int}.get(declared, int | float)
    if value is None and declared.endswith("None"):
        return
    if isinstance(value, bool) or not isinstance(value, wanted):
        kind = {"str": "text", "int": "a whole number"}.get(declared, "a number")
        raise ConfigError(f"{origin}: {key} = {value!r} must be {kind}.")
