"""Whole runs of ``run.train`` from a test: in forked ranks, on a small corpus of real text."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_slm.config.load import Resolved
from megatron_slm.launch.environment import RankEnvironment
from tests.ranks import run_ranks

# Small enough for a step in milliseconds; four layers divide into PP2 x VPP2.
TINY = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "train.global_batch_size=8",
    "train.eval_iters=1",
    "log.log_interval=1",
    "log.progress_bar=false",
    "parallel.device=cpu",
)


@cache
def corpus(parent: Path) -> Path:
    """A prepared corpus of a few modules of Python's standard library, vocabulary 512."""
    from megatron_slm.data.prepare import prepare

    source = Path(sysconfig.get_path("stdlib"))
    text = parent / "stdlib.txt"
    text.write_text("\n\n".join((source / name).read_text() for name in ("argparse.py", "ast.py", "calendar.py")))
    prepare([text], parent / "corpus", vocab_size=512)
    return parent / "corpus"


def train(
    directory: Path,
    data: Path,
    world_size: int,
    *overrides: str,
    fresh: bool = False,
    plant: Callable[[], None] | None = None,
    timeout_s: float = 120.0,
) -> int:
    """Train the tiny model as run ``directory``; returns the exit code.

    Args:
        plant: called in every rank before it trains, to plant a fault there.
        timeout_s: see ``run_ranks``.
    """
    codes = run_ranks(_train, world_size, given(directory, data, *overrides), fresh, plant, timeout_s=timeout_s)
    assert len(set(codes)) == 1, f"ranks returned different codes: {codes}"
    return int(codes[0])


def given(directory: Path, data: Path, *overrides: str) -> list[str]:
    """The command line of run ``directory``; the later of two values of one key counts."""
    own = (f"name={directory.name}", f"log.runs_dir={directory.parent}", f"data.data_path={data}")
    return list({item.split("=")[0]: item for item in (*TINY, *own, *overrides)}.values())


def _train(overrides: list[str], fresh: bool, plant: Callable[[], None] | None = None) -> int:
    """One rank of ``mslm train``."""
    from megatron_slm import run
    from megatron_slm.config.load import load

    environment = rank_environment()
    if plant is not None:
        plant()
    return run.train(load(None, overrides), environment, fresh=fresh)


def rank_environment() -> RankEnvironment:
    """Leave the world that ``run_ranks`` has made, and say what a launcher would tell this rank."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = [_free_port() if rank == 0 else 0]
    dist.broadcast_object_list(shared)
    dist.destroy_process_group()
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=shared[0],
        launcher="local",
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The objects of one of the run's files."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> dict[int, str]:
    """Bits of the loss by step."""
    return {record["step"]: record.get("lm_loss_bits") or record["loss_bits"] for record in records(run)}


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"iter_{step:07d}"


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything a checkpoint stores, by name: tensors, random states, common state, cursor."""
    from megatron_slm.train import payload
    from megatron_slm.train.payload_index import read_index

    index = read_index(checkpoint)
    found: dict[str, Any] = {name: payload.read_tensor(checkpoint, index, name) for name in index.tensors}
    found |= {name: payload.read_object(checkpoint, index, name) for name in index.objects}
    found["common"] = payload.read_common(checkpoint)
    found["state"] = json.loads((checkpoint / "state.json").read_text())
    return found


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of everything that is not equal to the last bit."""
    import torch

    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.equal(second)
        return [] if same else [name]
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(set(first) | set(second), key=str)
        missing = [f"{name}.{key}" for key in keys if (key in first) != (key in second)]
        both = [key for key in keys if key in first and key in second]
        return missing + [found for key in both for found in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{name}[{index}]")]
    return [] if first == second else [name]


def start(resolved: Resolved, plant: Callable[[], None] | None = None) -> int:
    """Train one configuration on as many ranks as it says, in the ranks of the tests."""
    codes = run_ranks(_train_resolved, resolved.config.parallel.world_size or 1, resolved, plant)
    assert len(set(codes)) == 1, f"ranks returned different codes: {codes}"
    return int(codes[0])


def _train_resolved(resolved: Resolved, plant: Callable[[], None] | None) -> int:
    from megatron_slm import run

    environment = rank_environment()
    if plant is not None:
        plant()
    return run.train(resolved, environment)
