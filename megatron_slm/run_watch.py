"""What keeps a run from dying in silence: watchdog, stragglers by name, telemetry, goodput, a word about every end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import datetime

import torch.distributed as dist

from megatron_slm.errors import NetworkError, UserError
from megatron_slm.launch.network import lost_peer
from megatron_slm.parallel.layout import AXES, EXPERT_AXES, Layout
from megatron_slm.run_parts import Run
from megatron_slm.survival.attempts import Goodput
from megatron_slm.survival.place import group_name, place_of
from megatron_slm.survival.straggler import Straggler
from megatron_slm.survival.watchdog import Watchdog
from megatron_slm.train.console import append_progress
from megatron_slm.train.hook import Hook
from megatron_slm.train.telemetry import Telemetry, Teller


def watching_hooks(run: Run) -> tuple[list[Hook], list[Hook]]:
    """Hooks that come before the log's and those that come behind it, for they say a last word in it. Collective."""
    config, rank = run.resolved.config, dist.get_rank()
    first: list[Hook] = []
    if config.parallel.hang_timeout > 0.0:
        axes, note = axes_of(run.layout), progress_note(run)
        limit_s = 60.0 * config.parallel.hang_timeout
        first.append(Watchdog(run.directory.path, rank=rank, limit_s=limit_s, axes=axes, note=note))
    if config.log.straggler_interval is not None and run.layout.world_size > 1:
        first.append(
            Straggler(
                config.log.straggler_interval,
                device=run.plan.device,
                peers=peers_of(run.layout),
                warn=run.log.warn if run.log is not None else lambda line: None,
                write=run.log.beside_step if run.log is not None else lambda values: None,
            )
        )
    first += telemetry(run)
    if run.log is None:
        return first, []
    interval = config.log.log_interval
    return first, [Goodput(run.directory, interval, write=run.log.beside_step, say=run.log.say)]


def telemetry(run: Run) -> list[Hook]:
    """Reads the ranks' GPUs: on GPUs unless it is switched off, elsewhere where it is asked for."""
    log, device = run.resolved.config.log, run.plan.device
    if not (device.type == "cuda" if log.telemetry is None else log.telemetry):
        return []
    tell = None if run.log is None else Teller(run.log.say, run.log.warn, run.log.beside_step)
    steps = run.resolved.config.train.train_iters
    return [Telemetry(log.log_interval, steps, device=device, directory=run.directory.path, tell=tell)]


def axes_of(layout: Layout) -> dict[tuple[int, ...], str]:
    """Names of all groups of ranks: the axis (or both, where two have the same ranks), or "world"."""
    expert = EXPERT_AXES if layout.expert_model_parallel_size > 1 else ()
    found: dict[tuple[int, ...], list[str]] = {}
    for axis in dict.fromkeys((*AXES, *expert)):
        for group in layout.groups_of(axis):
            if len(group) > 1:
                found.setdefault(tuple(group), []).append(axis)
    return {tuple(range(layout.world_size)): "world", **{group: "/".join(names) for group, names in found.items()}}


def peers_of(layout: Layout) -> list[list[int]]:
    """Of every rank, the ranks of its pipeline stage: they have the same layers."""
    stages = [layout.coordinates(rank).pp for rank in range(layout.world_size)]
    return [[other for other, stage in enumerate(stages) if stage == own] for own in stages]


def progress_note(run: Run) -> Callable[[str], None]:
    """Keeps a line in the run's ``progress.txt``."""

    def note(event: str) -> None:
        with contextlib.suppress(OSError):
            append_progress(run.directory.progress, event, world_size=run.layout.world_size, now=datetime.now())

    return note


@contextlib.contextmanager
def failures_noted(run: Run) -> Iterator[None]:
    """Note in ``progress.txt`` why this rank's training ends, and say what a lost peer is in one sentence.

    Raises:
        NetworkError: in place of what torch says about a peer or a network that is lost.
    """
    note, rank = progress_note(run), dist.get_rank()
    try:
        yield
    except UserError as error:
        if rank == 0 and error.exit_code != UserError.exit_code:
            note(f"Failed\t{error}".splitlines()[0])
        raise
    except Exception as error:  # whatever ends a rank is noted
        lost = lost_peer(error)
        if lost is None:
            note(f"Failed\trank {rank}: {type(error).__name__}: {error}".splitlines()[0])
            raise
        said = f"rank {rank} {_where(run)}: {lost}"
        note(f"Lost\t{said}")
        raise NetworkError(
            f"{said}. Start the same command again: the run goes on from its newest checkpoint."
        ) from error


def _where(run: Run) -> str:
    """In which exchange the error that is being handled has come up."""
    trace = sys.exc_info()[2]
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "has lost a peer"
    place = place_of(trace.tb_frame)
    step = f"at step {run.state.step + 1}"
    if not place.exchanging:
        return f"{step}, {place.line}"
    return f"{step}, in {place.operation} of {group_name(place.ranks, axes_of(run.layout))} ({place.line})"
