"""One rank's part of ``mslm plan calibrate``: join the job, measure, and let rank 0 fit and write."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist

from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.device import bind, device_name
from megatron_slm.parallel.groups import process_groups
from megatron_slm.plan import measure
from megatron_slm.plan.calibrate import Machine, calibrated, to_json_record
from megatron_slm.train.peak_flops import peak_flops

GIB = 2.0**30


class Environment(Protocol):
    """What is read of a rank's place in the job (``launch.environment.RankEnvironment``)."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_world_size(self) -> int: ...
    @property
    def master_addr(self) -> str: ...
    @property
    def master_port(self) -> int: ...


def measure_rank(environment: Environment, device: str, output: Path) -> None:
    """Measure on every rank; rank 0 writes ``output``."""
    bind(device, environment.local_rank)
    world, local = environment.world_size, environment.local_world_size
    master = (environment.master_addr, environment.master_port)
    config = ParallelConfig(world_size=world)
    with process_groups(config, device=device, rank=environment.rank, world_size=world, master=master):
        # One rank at a time would measure a machine that no job sees: the others would leave it the memory's bandwidth.
        samples = list(measure.kernels(device))
        samples += measure.exchanges(device, link_groups(environment.rank, world, local))
        dist.barrier()
    if environment.rank:
        return
    about = {
        "host": platform.node(),
        "device": device_name(device),
        "ranks": world,
        "ranks_per_node": local,
        "torch": torch.__version__,
        "backend": "nccl" if device == "cuda" else "gloo",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    machine = Machine(
        name=f"{about['device']} of {about['host']}",
        gpus_per_node=local,
        nodes=world // local,
        memory_gib=memory_gib(device, local),
        bf16_tflops=None if (peak := peak_flops(device_name(device), "bfloat16")) is None else peak / 1e12,
    )
    origin = f"{about['device']}, {world} ranks, torch {about['torch']}, {about['backend']}, {about['date']}"
    cluster, rates = calibrated(samples, machine, provenance=origin)
    output.write_text(json.dumps(to_json_record(cluster, rates, samples, about), indent=1) + "\n", encoding="utf-8")


def link_groups(rank: int, world: int, local: int) -> list[tuple[Any, int, int]]:
    """This rank's groups that lie on one kind of link: its node, and its place in every node. Collective.

    Returns:
        (process group, ranks, those in this node) of every group of more than one rank.
    """
    found = []
    nodes = [list(range(first, first + local)) for first in range(0, world, local)]
    places = [list(range(place, world, local)) for place in range(local)]
    for members, in_node in [*((node, local) for node in nodes), *((place, 1) for place in places)]:
        group = dist.new_group(members)
        if rank in members and len(members) > 1:
            found.append((group, len(members), in_node))
    return found


def memory_gib(device: str, local: int) -> float:
    """Of one rank: what torch sees of its GPU, or its share of the machine's memory."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / GIB
    return float(psutil.virtual_memory().total) / GIB / local
