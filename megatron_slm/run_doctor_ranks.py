"""The ranks that are examined: how they meet, and how rank 0 hears of each what it found or why it did not.

Answers go over a key-value store and not over collectives: a rank that hangs in one is then the one without an answer.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_slm.doctor import nodes, pace
from megatron_slm.doctor.board import Board
from megatron_slm.doctor.result import EXCLUDE, Result
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.parallel.device import default_backend
from megatron_slm.run_doctor import Examination

JOIN_S, STAGE_S, SETTLE_S = 60.0, 60.0, 5.0
"""How long rank 0 waits for the ranks to come; how long a collective or an answer may take after that; and how long
the others' answers may take when its own collective has failed, which it has then for them too."""


class RankMissing(Exception):
    """Ranks have not answered: what needs all of them is left out from here on."""


@dataclass
class World:
    """One rank's place among the others while they are examined.

    ``results`` are rank 0's; ``hosts`` are known to all after ``meet``.
    """

    environment: RankEnvironment
    examination: Examination
    board: Board
    hosts: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    crowded: float = 0.0
    """On rank 0: share of its time that a CPU rank waits for a core because of the other ranks alone (median)."""
    same_cores: dict[int, int] = field(default_factory=dict)
    """On rank 0: rank -> the first rank of its machine that may run on the same cores."""
    busy: bool = False
    """On rank 0: see :func:`megatron_slm.doctor.pace.busy`."""

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.environment.rank

    @property
    def first(self) -> bool:
        """Whether this rank judges."""
        return self.environment.rank == 0

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return self.examination.device

    @property
    def backend(self) -> str:
        """Collective library that the job will use."""
        return self.examination.config.parallel.distributed_backend or default_backend(self.device)

    @property
    def ranks(self) -> pace.Ranks:
        """Where all ranks are."""
        return pace.Ranks(self.hosts, self.device, self.busy)

    @property
    def firsts(self) -> dict[str, int]:
        """Host -> its first rank, which speaks for it."""
        return {host: self.hosts.index(host) for host in dict.fromkeys(self.hosts)}

    def answers(self, name: str, work: Callable[[], Any], ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Do ``work`` on every rank (of ``ranks``) and hear all answers on rank 0; {} on the others.

        Raises:
            RankMissing: on every rank, if one has failed or has not answered; rank 0 has noted which.
        """
        ended: dict[str, Any] = {}
        if ranks is None or self.rank in ranks:
            try:
                ended = {"value": work()}
            except Exception as error:  # a broken exchange is a result
                ended = {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]}
            self.board.post(name, ended)
        expected = range(self.environment.world_size) if ranks is None else ranks
        if self.first:
            found = self.board.answers(name, SETTLE_S if "error" in ended else STAGE_S, ranks)
            silent = [rank for rank in expected if rank not in found]
            errors = {rank: answer["error"] for rank, answer in found.items() if "error" in answer}
            # Beside a rank that does not answer the others' errors are that they waited for it.
            wrong: dict[int, str | None] = dict.fromkeys(silent) or dict(errors)
            self.results += [self._wrong(name, rank, text) for rank, text in wrong.items()]
            self.board.decide(f"{name}/complete", not wrong)
            if wrong:
                raise RankMissing(name)
            return {rank: answer["value"] for rank, answer in found.items()}
        if not self.board.decision(f"{name}/complete", 2 * STAGE_S):
            raise RankMissing(name)
        return {}

    def _wrong(self, name: str, rank: int, error: str | None) -> Result:
        host = self.hosts[rank] if self.hosts else ""
        who = f"rank {rank}" + (f" on {host}" if host else "")
        value = f"{who} failed: {error}" if error is not None else f"{who} gave no answer"
        remedy = f"Look at its log and at the network between the ranks, or {EXCLUDE}."
        return Result("ranks", name, "fail", value, "an answer of every rank", remedy, host)


def reach(environment: RankEnvironment) -> dist.Store:
    """Where rank 0 listens; under torchrun its agent does already.

    Raises:
        RuntimeError: this machine does not reach it (:func:`unreachable` says so).
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        environment.world_size,
        is_master=environment.rank == 0 and not of_agent,
        timeout=datetime.timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore("doctor", store)


def unreachable(environment: RankEnvironment, error: Exception) -> Result:
    address = f"{environment.master_addr}:{environment.master_port}"
    said = str(error).strip().splitlines()[0][:200]
    return Result(
        "ranks",
        "meeting point",
        "fail",
        f"rank {environment.rank} on {socket.gethostname()} does not reach {address}: {said}",
        "rank 0 listens there",
        "Check MASTER_ADDR and MASTER_PORT, the name service, and a firewall between this machine and that of rank 0.",
        socket.gethostname(),
    )


def meet(world: World) -> None:
    """Learn who is where. Rank 0 waits longest here, and says which ranks have not come."""
    size = world.environment.world_size
    world.board.post("here", {"host": socket.gethostname(), "cores": sorted(os.sched_getaffinity(0))})
    if world.first:
        found = world.board.answers("here", JOIN_S)
        if absent := [rank for rank in range(size) if rank not in found]:
            known = ", ".join(dict.fromkeys(answer["host"] for answer in found.values()))
            named = ", ".join(map(str, absent[:16])) + (" ..." if len(absent) > 16 else "")
            value = f"rank {named} of {size} did not come within {JOIN_S:.0f} s; the others are on {known}"
            remedy = "Look at the logs of the nodes that are not among them: is the launcher's list of hosts right?"
            world.results.append(Result("ranks", "present", "fail", value, f"{size} ranks", remedy))
            world.board.decide("hosts", None)
            raise RankMissing("here")
        world.hosts = [answer["host"] for answer in found.values()]
        world.board.decide("hosts", world.hosts)
        value = f"{size} rank(s) on {len(world.firsts)} node(s)"
        world.results.append(Result("ranks", "present", "ok", value))
        threads = int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0] or 1)
        cores = {rank: answer["cores"] for rank, answer in found.items()}
        world.results += nodes.pinned(cores, world.hosts, threads)
        world.crowded = nodes.crowded(cores, world.hosts, threads)
        world.same_cores = nodes.same_cores(cores, world.hosts)
        return
    hosts = world.board.decision("hosts", 2 * JOIN_S)
    if hosts is None:
        raise RankMissing("here")
    world.hosts = hosts


def new_group(ranks: tuple[int, ...], backend: str) -> Any:
    """Made by its members alone, whose number is all that it costs."""
    timeout = datetime.timedelta(seconds=STAGE_S)
    return dist.new_group(list(ranks), backend=backend, timeout=timeout, use_local_synchronization=True)
