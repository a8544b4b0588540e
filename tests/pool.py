"""Gloo ranks that stay alive and take call after call: ``with RankPool(4) as pool: pool.call(work, 2, argument)``.

Starting ranks and importing in them costs more than a small job. Each call joins a new default group of as many ranks
as it asks for; the other ranks wait. A rank that fails ends the pool's ranks: the call raises what
``run_ranks`` would have raised, with the rank's traceback, and the next call starts new ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_slm.launch.kinship import die_with_parent
from megatron_slm.launch.port import reserve_port
from tests.ranks import RankFailure, function_named, run_ranks, warm_parent

IDLE_SECONDS = 1800.0
_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Call:
    """One function for the first ``world_size`` ranks: as in ``tests.ranks.Job``, and where they meet."""

    module: str
    file: str | None
    qualname: str
    arguments: bytes
    world_size: int
    port: int
    timeout_s: float


class RankPool:
    """``size`` ranks, started at the first call. One pool at a time: it occupies the warm parent of ``run_ranks``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[Connection[Any, Any]] = []
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, work: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """Like ``run_ranks``, on the first ``world_size`` ranks of the pool.

        Raises:
            RankFailure: a rank raised, exited, was killed or hung; the message names it. The pool begins anew.
        """
        if self._thread is None:
            self._start()
        with reserve_port(_ADDRESS) as reserved:
            call = Call(
                module=work.__module__,
                file=getattr(sys.modules[work.__module__], "__file__", None),
                qualname=work.__qualname__,
                arguments=pickle.dumps(arguments),
                world_size=world_size,
                port=reserved.getsockname()[1],
                timeout_s=timeout_s,
            )
            try:
                for rank in self._ranks[:world_size]:
                    rank.send(call)
                return [pickle.loads(rank.recv_bytes()) for rank in self._ranks[:world_size]]
            except (EOFError, OSError):
                failure = self._end()
                raise failure or RankFailure(1, f"a rank of the pool ended during {call.qualname}") from None

    def close(self) -> None:
        """Let the ranks go and wait for them."""
        self._end()

    def _start(self) -> None:
        self._failure = None
        warm_parent()  # started here, not by the thread below: it would die with that thread, and so with this pool
        with (
            tempfile.TemporaryDirectory(prefix="pool-") as directory,
            Listener(str(Path(directory, "socket")), "AF_UNIX", backlog=self.size) as listener,
        ):
            self._thread = threading.Thread(target=self._run, args=(listener.address,), daemon=True)
            self._thread.start()
            self._ranks = [listener.accept() for _ in range(self.size)]
        try:
            self._ranks.sort(key=lambda connection: connection.recv())
        except EOFError:
            raise self._end() or RankFailure(1, "a rank of the pool did not start") from None

    def _run(self, address: str) -> None:
        try:
            run_ranks(take_calls, self.size, address, timeout_s=IDLE_SECONDS)
        except BaseException as error:  # the caller of the call that it ended raises it
            self._failure = error
            with contextlib.suppress(OSError):
                for _ in range(self.size):  # whoever still waits for a rank
                    Client(address, "AF_UNIX").close()

    def _end(self) -> BaseException | None:
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.close()
        self._ranks = []
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._failure


def take_calls(address: str) -> None:
    """The life of one rank of a pool, which ends when the pool closes the connection.

    Each call is answered by a fork of the rank. What a call leaves behind ends with it: patches, core's globals, and
    gloo's threads, which poll 100 times a second as long as anything refers to a group (core does, in its caches).
    """
    rank = dist.get_rank()
    dist.destroy_process_group()  # each call has a group of its own, of its own size
    with Client(address, "AF_UNIX") as connection:
        connection.send(rank)
        faulthandler.cancel_dump_traceback_later()
        parent = os.getpid()
        while True:
            try:
                call: Call = connection.recv()
            except (EOFError, OSError):
                return
            pid = os.fork()
            if pid == 0:
                die_with_parent(parent)
                _answer(call, rank, connection)
            _, status = os.waitpid(pid, 0)
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"rank {rank} of {call.world_size} ended with {code} in {call.qualname}; see above")


def _answer(call: Call, rank: int, connection: Connection[Any, Any]) -> NoReturn:
    """Do the work of one call as one rank, send what comes of it, and end."""
    code = 1
    try:
        faulthandler.dump_traceback_later(call.timeout_s, exit=True)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{_ADDRESS}:{call.port}",
            rank=rank,
            world_size=call.world_size,
            timeout=datetime.timedelta(seconds=call.timeout_s),
        )
        result = function_named(call.module, call.file, call.qualname)(*pickle.loads(call.arguments))
        dist.barrier()  # rank 0 holds the store: nobody leaves while another still needs it
        connection.send_bytes(pickle.dumps(result))
        code = 0
    except BaseException:  # whatever ends the work is reported
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
