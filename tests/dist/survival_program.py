"""``mslm`` with a fault planted in one rank, run by path: ``survival_program.py FAULT RANK STEP TOKENS...``.

FAULT is "sleeps" or "circles" (for ever) or "raises" before update STEP, or "slow": three times as slow from STEP on.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megatron_slm import cli
from megatron_slm.train import loop

FAULT, RANK, STEP = sys.argv[1], sys.argv[2], int(sys.argv[3])


def plant() -> None:
    """Ranks are forked from this process, so that they inherit it."""
    take_step = loop.train_step

    def faulty(state: Any, *arguments: Any, **keywords: Any) -> Any:
        struck = os.environ["RANK"] == RANK
        if struck and FAULT != "slow" and state.step + 1 == STEP:
            strike()
        started = time.perf_counter()
        outcome = take_step(state, *arguments, **keywords)
        if struck and FAULT == "slow" and state.step >= STEP:
            time.sleep(2.0 * (time.perf_counter() - started))
        return outcome

    loop.train_step = faulty


def strike() -> None:
    if FAULT == "raises":
        raise ValueError("the sensor is broken")
    while FAULT == "circles":
        sum(range(1000))
        sorted(range(1000))
    time.sleep(1000.0)


if __name__ == "__main__":
    plant()
    sys.exit(cli.main(sys.argv[4:]))
