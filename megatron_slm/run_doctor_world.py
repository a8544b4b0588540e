"""``mslm doctor`` on every rank of a job: what only several machines together can tell. Rank 0 judges and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.doctor import clock, nodes, storage
from megatron_slm.doctor.board import Board
from megatron_slm.doctor.result import Result, from_record
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.parallel.device import bind
from megatron_slm.run_doctor import Examination, facts, local_results
from megatron_slm.run_doctor_pace import examine_collectives, examine_pace, examine_pairs
from megatron_slm.run_doctor_ranks import STAGE_S, RankMissing, World, meet, new_group, reach, unreachable

EXCHANGES = 8
"""Questions to a clock; the quickest answer counts."""
FAILING_FACTS = frozenset({"python", "torch", "megatron-core", "transformer-engine", "GPUs"})


def examine(environment: RankEnvironment, examination: Examination) -> tuple[list[Result], Board | None]:
    """One rank's part; every rank of the job calls this.

    Returns:
        All results on rank 0, none on the others; and the board, on which rank 0 leaves the exit code (None where this
        rank has not reached it: its own results then say so).
    """
    # A broken NCCL exchange is to raise here, not to end the process from a thread of torch's.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        store = reach(environment)
    except RuntimeError as error:
        return [unreachable(environment, error)], None
    world = World(environment, examination, Board(store, environment.rank, environment.world_size))
    try:
        meet(world)
        _machines(world)
        with _exchanging(world, store) as group:
            _clocks(world)
            _shared_storage(world)
            examine_pace(world)
            examine_pairs(world, group)
            if not examination.quick:
                examine_collectives(world)
    except RankMissing:
        pass  # it is noted who; what else was found is kept
    except Exception as error:  # a probe that breaks is a result
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
        remedy = "Run it again with --quick, and look at the ranks' logs for what came before."
        world.results.append(Result("ranks", "examination", "fail", f"it broke off: {said}", "it ends", remedy))
    return world.results, world.board


def _machines(world: World) -> None:
    """Every machine's own probes, by its first rank, and what differs between machines."""
    here = world.hosts.count(world.hosts[world.rank])

    def work() -> dict[str, Any]:
        own = local_results(world.examination, ranks_here=here, nodes=len(world.firsts), started=True)
        return {"results": [dataclasses.asdict(one) for one in own], "facts": facts()}

    found = world.answers("machine", work, list(world.firsts.values()))
    if world.first:
        world.results += [from_record(record) for answer in found.values() for record in answer["results"]]
        by_host = {world.hosts[rank]: answer["facts"] for rank, answer in found.items()}
        world.results += nodes.differing(by_host, FAILING_FACTS)


@contextlib.contextmanager
def _exchanging(world: World, store: dist.Store) -> Iterator[Any]:
    """Gloo between all ranks, and the group over which exchanges are measured: gloo's or NCCL's."""
    environment = world.environment
    groups: list[Any] = []

    def work() -> None:
        bind(world.device, environment.local_rank)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=datetime.timedelta(seconds=STAGE_S),
        )
        groups.append(new_group(tuple(range(environment.world_size)), world.backend))
        dist.barrier()

    try:
        world.answers(f"connection over {world.backend}", work)
        yield groups[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _clocks(world: World) -> None:
    """Offset of every node's clock to rank 0's."""
    others = {host: rank for host, rank in world.firsts.items() if rank != 0}

    def work() -> dict[str, tuple[float, float]]:
        if world.first:
            return {host: clock.offset(_asked(rank)) for host, rank in others.items()}
        if world.rank in others.values():
            _answer()
        return {}

    if not others:
        return
    found = world.answers("clocks", work)
    if world.first:
        world.results += clock.judged({host: tuple(pair) for host, pair in found[0].items()}, world.hosts[0])


def _asked(rank: int) -> list[clock.Exchange]:
    """Questions to a rank's clock, and its answers."""
    found = []
    for _ in range(EXCHANGES):
        answer = torch.zeros(2, dtype=torch.float64)
        sent = time.time()
        dist.send(torch.zeros(1, dtype=torch.float64), rank)
        dist.recv(answer, rank)
        back = time.time()
        found.append((sent, float(answer[0]), float(answer[1]), back))
    return found


def _answer() -> None:
    """The other side of :func:`_asked`."""
    for _ in range(EXCHANGES):
        dist.recv(torch.zeros(1, dtype=torch.float64), 0)
        received = time.time()
        dist.send(torch.tensor([received, time.time()], dtype=torch.float64), 0)


def _shared_storage(world: World) -> None:
    """A file that rank 0 writes and locks in the directory of runs is seen, and its lock refused, on every node."""
    if len(world.firsts) == 1:
        return
    with contextlib.ExitStack() as kept:
        written = world.board.agreed(
            "nonce", lambda: _write_nonce(storage.nearest(world.examination.runs), kept), STAGE_S
        )
        if written is None:
            return  # that rank 0 cannot write there is said by its own probe
        path, content = Path(written[0]), str(written[1])
        found = world.answers("storage", lambda: storage.seen(path, content), list(world.firsts.values())[1:])
    if world.first:
        answers = {world.hosts[rank]: (str(problem), bool(refused)) for rank, (problem, refused) in found.items()}
        world.results += storage.shared(path, answers, world.hosts[0])


def _write_nonce(place: Path, kept: contextlib.ExitStack) -> tuple[str, str] | None:
    """Path and content of a file that stays, locked, until ``kept`` is closed; None where it cannot be written."""
    path, content = place / f".mslm-doctor-{secrets.token_hex(8)}", secrets.token_hex(8)
    kept.callback(path.unlink, missing_ok=True)
    try:
        stream = kept.enter_context(path.open("w", encoding="utf-8"))
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError:
        return None
    return str(path), content
