"""A trained model's ranks, for a command that reads it: this process alone, a launcher's rank, or ranks of its own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.launch.environment import RankEnvironment


def on_ranks_of(
    run: Path, work: Callable[[RankEnvironment | None], int], command: Sequence[str], *, one_rank: bool
) -> int:
    """Do ``work`` on as many ranks as the model is divided over; returns the exit code.

    Args:
        work: is given this rank's environment, None where one rank is alone.
        command: what was typed after ``mslm``, for ranks that cannot be forked.
        one_rank: load the whole model here, whatever its layout.
    """
    from megatron_slm import run_generate
    from megatron_slm.launch.environment import from_environment

    if one_rank or (ranks := run_generate.ranks_of(run)) == 1:
        return work(None)
    if (environment := from_environment(os.environ)) is not None:
        from megatron_slm.launch.rank import run_rank

        return run_rank(environment, work)
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device

    return run_local(
        ranks,
        work,
        preload=_preload,
        warm=lambda: choose_device("auto") == "cpu",
        command=[sys.executable, "-m", "megatron_slm.cli", *command],
    )


def _preload() -> None:
    from megatron_slm.parallel.device import preload

    preload("cpu")
    for module in ("torch._dynamo", "megatron_slm.rollout.generate", "megatron_slm.train.checkpoint"):
        importlib.import_module(module)  # once here instead of once in every rank
