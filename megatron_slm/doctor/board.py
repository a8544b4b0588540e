"""Where ranks leave what they found, and rank 0 says how to go on: a key-value store, which no collective can block.

A rank that hangs or has died is then the one whose answer is missing, and the others' findings are kept.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

POLL_S = 0.01


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None: ...


class Board:
    """One rank's access to it. Names are used once; values are JSON."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size

    def post(self, name: str, value: Any) -> None:
        """Leave this rank's answer to ``name``."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def answers(self, name: str, limit_s: float, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Rank -> its answer; a rank that has not answered within ``limit_s`` is missing."""
        waited = {rank: f"{name}/{rank}" for rank in (range(self.world_size) if ranks is None else ranks)}
        found: dict[int, Any] = {}
        give_up = time.monotonic() + limit_s
        while waited:
            for rank, key in list(waited.items()):
                if self._store.check([key]):
                    found[rank] = json.loads(self._store.get(key))
                    del waited[rank]
            if time.monotonic() > give_up:
                break
            if waited:
                time.sleep(POLL_S)
        return dict(sorted(found.items()))

    def decide(self, name: str, value: Any) -> Any:
        """Rank 0's word on ``name``; returns it."""
        self._store.set(name, json.dumps(value))
        return value

    def decision(self, name: str, limit_s: float) -> Any:
        """What rank 0 has decided.

        Raises:
            RuntimeError: it has said nothing within ``limit_s`` (torch's ``DistStoreError``), or its machine is gone.
        """
        self._store.wait([name], datetime.timedelta(seconds=limit_s))
        return json.loads(self._store.get(name))

    def agreed(self, name: str, decide: Callable[[], Any], limit_s: float) -> Any:
        """On rank 0 decide, on the others hear."""
        return self.decide(name, decide()) if self.rank == 0 else self.decision(name, limit_s)
