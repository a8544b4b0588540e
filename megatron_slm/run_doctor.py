"""``mslm doctor`` on one machine: which probes a job needs, and what they find. No torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_slm.config.run_config import RunConfig
from megatron_slm.doctor import gpus, limits, network, packages, storage, versions
from megatron_slm.doctor.result import Probe, Result, on_host, run_probes
from megatron_slm.model.counts import adapter_parameters, parameters

PROBE_LIMIT_S, IMPORTS_LIMIT_S = 8.0, 40.0
"""A file system that hangs is given up before the other ranks give this machine up (``run_doctor_ranks.STAGE_S``)."""
MOMENTS_BYTES = 12
"""Of one trained parameter in a checkpoint, beside the weight: master weight and two moments in fp32."""


@dataclass(frozen=True)
class Examination:
    """What is asked of this machine.

    Attributes:
        config: of the job; the defaults where none is named.
        named: whether the user has named one.
        device: where its ranks run: ``cuda`` or ``cpu``.
        quick: leave out what takes seconds: imports, throughput, collectives.
    """

    config: RunConfig
    named: bool
    device: str
    quick: bool = False

    @property
    def runs(self) -> Path:
        """Where runs are kept."""
        return Path(self.config.log.runs_dir)

    @property
    def checkpoint_bytes(self) -> int | None:
        """Of one checkpoint of the job, by counting; None where no model or vocabulary is given."""
        model, lora = self.config.model, self.config.lora
        if not self.named or model.vocab_size is None:
            return None
        held = parameters(model, model.padded_vocab_size(model.vocab_size))
        weight = 8 if self.config.precision.fp64 else 2 if self.config.precision.bf16 else 4
        trained = adapter_parameters(model, lora) if lora.lora_rank else held
        return held * weight + trained * MOMENTS_BYTES

    @property
    def needed_packages(self) -> frozenset[str]:
        """Optional packages that the configuration cannot do without."""
        engine = self.device == "cuda" and (
            self.config.precision.fp8 is not None or self.config.parallel.moe_grouped_gemm
        )
        # Runs without a loader of that name have no such field.
        dali = getattr(self.config.data, "loader", None) == "dali"
        return frozenset(name for name, is_needed in (("transformer-engine", engine), ("dali", dali)) if is_needed)


def local_results(examination: Examination, *, ranks_here: int, nodes: int, started: bool) -> list[Result]:
    """Everything that one machine tells by itself.

    Args:
        ranks_here: ranks of the job on it.
        nodes: machines of the job.
        started: whether the ranks run already, so that their meeting point is taken.
    """
    found = run_probes(
        _probes(examination, ranks_here, nodes, started),
        lambda subject: IMPORTS_LIMIT_S if subject == packages.SUBJECT else PROBE_LIMIT_S,
    )
    return on_host(found, socket.gethostname())


def _probes(examination: Examination, ranks_here: int, nodes: int, started: bool) -> dict[tuple[str, str], Probe]:
    environ, runs, quick = os.environ, examination.runs, examination.quick
    infiniband = any(network.INFINIBAND.glob("*/ports/*"))
    cuda_ranks = ranks_here if examination.device == "cuda" else 0
    needed, patience_s = examination.needed_packages, IMPORTS_LIMIT_S - 5.0
    imported = partial(packages.probe, examination.device, needed, imports=not quick, limit_s=patience_s)
    found: dict[tuple[str, str], Probe] = {
        (versions.SUBJECT, "versions"): versions.probe,
        (packages.SUBJECT, "imports"): imported,
        (gpus.SUBJECT, "NVML"): partial(gpus.probe, cuda_ranks),
        ("cores", "cores"): partial(limits.cores, environ, ranks_here),
        (limits.SUBJECT, "ulimits"): partial(limits.ulimits, infiniband),
        (limits.SUBJECT, "/dev/shm"): limits.shared_memory,
        (limits.SUBJECT, "control group"): limits.control_group,
        (network.SUBJECT, "host name"): partial(network.host_name, nodes, environ),
        (network.SUBJECT, "interfaces"): partial(network.interfaces, environ),
        (network.SUBJECT, "InfiniBand"): network.fabric,
        (storage.SUBJECT, "runs_dir"): partial(storage.writable, runs),
        (storage.SUBJECT, "space"): partial(storage.room, runs, examination.checkpoint_bytes),
        (storage.SUBJECT, "latency"): partial(storage.latency, runs),
        (storage.SUBJECT, "atomic rename"): partial(storage.rename, runs),
        (storage.SUBJECT, "locks"): partial(storage.lock, runs),
    }
    if not started:
        found[network.SUBJECT, "meeting point"] = partial(network.meeting_point, environ)
    if not quick:
        found[storage.SUBJECT, "throughput"] = partial(storage.throughput, runs, examination.checkpoint_bytes)
    return found


def facts() -> dict[str, str]:
    """Of this machine: what must be equal on all."""
    return {**versions.installed(), **gpus.facts(), **network.facts()}
