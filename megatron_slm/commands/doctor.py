"""The verbs ``mslm doctor``: is this configuration, on this machine, fit for what is asked of it?"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, resolve, violations_of
from megatron_slm.commands.memory import whole_batch
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.run_config import RunConfig
    from megatron_slm.doctor.result import Result
    from megatron_slm.launch.environment import RankEnvironment

EXIT_ACTIVE = 1
EXIT_UNFIT = 1
MOST_LOCAL_RANKS = 16
"""CPU ranks that are started here unasked; a larger job is examined under its own launcher."""
EXIT_PATIENCE_S, EXIT_HEARD_S = 300.0, 5.0


@dataclass(frozen=True)
class Asked:
    """What was typed after ``mslm doctor``."""

    config: RunConfig
    named: bool
    """Whether a configuration was named; the defaults otherwise."""
    quick: bool
    as_json: bool


def doctor(name: str, tokens: Sequence[str]) -> int:
    """``mslm doctor``: this machine, or every machine of a job, before anything is started on it."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--ranks N] [--quick] [--json]",
        "Say whether this machine, or every machine of a job, is fit for training: versions and packages, GPUs, "
        "network, limits, storage; with ranks also clocks, a shared file system, and the pace of every rank, link and "
        "collective of CONFIG's layout, with what is slow or unlike the others by name. Under srun, torchrun or mpirun "
        "it runs on every rank; otherwise CONFIG's ranks (or N) are started here if they fit. Exit code 0 without a "
        "failure, 1 with one, 2 if the input is refused.",
        example="mslm doctor --quick",
        notes=OVERRIDES + "\nSee also: mslm doctor determinism --help",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks here; default as CONFIG says")
    parser.add_argument("--quick", action="store_true", help="leave out imports, throughput and collectives")
    parser.add_argument("--json", action="store_true", help="print every result as JSON")
    own, rest = parser.parse_known_args(tokens)
    if own.ranks is not None and own.ranks < 1:
        raise ConfigError(f"--ranks {own.ranks} must be at least 1.")
    asked = Asked(_config(rest), bool(rest), own.quick, own.json)
    # Before torch is imported: beside a rank that is not reached it prints its own stack, and we a sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from megatron_slm.launch.environment import from_environment

    environment = from_environment(os.environ)
    if environment is not None:
        if own.ranks is not None:
            started = f"{environment.launcher} has started {environment.world_size} already"
            raise ConfigError(f"--ranks {own.ranks} starts ranks, but {started}. Leave it out.")
        return _on_rank(environment, asked)
    ranks = own.ranks or (_ranks_of(asked.config) if asked.named else 1)
    if ranks > 1 and (own.ranks is not None or ranks <= _room_for_ranks(asked.config)):
        return _on_ranks(ranks, asked, [sys.executable, "-m", "megatron_slm.cli", name, *tokens])
    return _alone(asked, ranks)


def _config(tokens: Sequence[str]) -> RunConfig:
    """The job's configuration, refused if it breaks a rule; the defaults where none is named."""
    if not tokens:
        from megatron_slm.config.run_config import RunConfig

        return RunConfig()
    resolved = resolve(tokens)
    resolved = dataclasses.replace(resolved, config=whole_batch(resolved)[0])
    if found := violations_of(resolved, None, files=False):
        raise ConfigError("\n".join(found))
    return resolved.config


def _ranks_of(config: RunConfig) -> int:
    return config.parallel.world_size or config.parallel.smallest_world_size


def _room_for_ranks(config: RunConfig) -> int:
    """Ranks that this machine can start."""
    from megatron_slm.doctor import gpus

    if config.parallel.device == "cpu":
        return MOST_LOCAL_RANKS
    return gpus.count() or (0 if config.parallel.device == "cuda" else MOST_LOCAL_RANKS)


def _alone(asked: Asked, ranks: int) -> int:
    """What this machine tells without ranks, and without torch."""
    from megatron_slm.doctor import gpus
    from megatron_slm.doctor.result import Result
    from megatron_slm.run_doctor import Examination, local_results

    start = time.monotonic()
    wanted = asked.config.parallel.device
    device = "cuda" if wanted == "cuda" or (wanted == "auto" and gpus.count()) else "cpu"
    examination = Examination(asked.config, asked.named, device, asked.quick)
    results = local_results(examination, ranks_here=1, nodes=1, started=False)
    if ranks > 1:
        value = f"the job has {ranks}, and they are not started here: clocks, links and collectives are not examined"
        expected = "under the job's launcher: srun, torchrun or mpirun ... mslm doctor CONFIG; here: --ranks N"
        results.append(Result("ranks", "other ranks", "absent", value, expected))
    return _print(asked, results, f"{socket.gethostname()}, {device}", start)


def _on_ranks(ranks: int, asked: Asked, command: Sequence[str]) -> int:
    """Start the ranks on this machine."""
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device
    from megatron_slm.parallel.layout import Layout

    Layout.from_config(asked.config.parallel, ranks)  # refused here, once, and not on every rank
    return run_local(
        ranks,
        partial(_examined, asked),
        preload=_preload,
        warm=lambda: choose_device(asked.config.parallel.device) == "cpu",
        command=list(command),
    )


def _preload() -> None:
    """What every rank needs, once for all; nothing of core's, so that a broken one is found and not run into."""
    import megatron_slm.run_doctor_world  # noqa: F401


def _on_rank(environment: RankEnvironment, asked: Asked) -> int:
    """This process is one rank of a job that a launcher has started."""
    from megatron_slm.launch.rank import run_rank

    return run_rank(environment, partial(_examined, asked))


def _examined(asked: Asked, environment: RankEnvironment) -> int:
    """One rank: examine, and on rank 0 print; all return the same exit code."""
    from megatron_slm.parallel.device import choose_device
    from megatron_slm.parallel.layout import Layout
    from megatron_slm.run_doctor import Examination
    from megatron_slm.run_doctor_world import examine

    start = time.monotonic()
    Layout.from_config(asked.config.parallel, environment.world_size)
    device = choose_device(asked.config.parallel.device)
    results, board = examine(environment, Examination(asked.config, asked.named, device, asked.quick))
    about = f"{environment.world_size} x {device} ({environment.launcher})"
    if board is None:  # what this rank knows, no other does
        return _print(asked, results, f"{about}, rank {environment.rank}", start)
    if environment.rank == 0:
        code = board.decide("exit code", _print(asked, results, about, start))
        board.answers("heard", EXIT_HEARD_S, range(1, environment.world_size))  # the store goes with this process
        return int(code)
    try:
        code = board.decision("exit code", EXIT_PATIENCE_S)
        board.post("heard", True)
    except RuntimeError:
        print(f"mslm: rank {environment.rank} does not hear of rank 0 any more; look at its log", file=sys.stderr)
        return EXIT_UNFIT
    return int(code)


def _print(asked: Asked, results: Sequence[Result], about: str, start: float) -> int:
    """Print the report; returns the exit code."""
    from megatron_slm.doctor import report

    write = report.to_json if asked.as_json else report.render
    print(write(results, f"mslm doctor on {about}", time.monotonic() - start), flush=True)
    return EXIT_UNFIT if report.failures(results) else EXIT_OK


def determinism(name: str, tokens: Sequence[str]) -> int:
    """``mslm doctor determinism``: what can make two equal runs differ, and what to set."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--json]",
        "List every source of nondeterminism of a job, whether it is active on its device under the variables of this "
        "shell, and what to set; and what must be equal for two runs to be equal to the last bit. The device is "
        "parallel.device, whether or not it is here. Exit code 0 if nothing is active, 1 if something is.",
        example="mslm doctor determinism --preset tiny --deterministic parallel.device=cuda parallel.world_size=8",
        notes=OVERRIDES,
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    own, rest = parser.parse_known_args(tokens)
    resolved = resolve(rest)
    if found := violations_of(resolved, None, files=False):
        raise ConfigError("\n".join(found))
    from megatron_slm.parallel.device import choose_device, device_name, preload

    parallel, here = resolved.config.parallel, choose_device("auto")
    device = here if parallel.device == "auto" else parallel.device
    preload(device)
    from megatron_slm.doctor import determinism as room

    world_size = parallel.world_size or parallel.smallest_world_size
    target = room.target_of(resolved.config, device, world_size, os.environ)
    terms = room.contract(target, device_name(device) if device in ("cpu", here) else device)
    print(room.to_json(target, terms) if own.json else room.report(target, terms))
    return EXIT_ACTIVE if room.active(target) else EXIT_OK


VERBS: Mapping[str, Verb] = {
    "doctor": Verb("whether this machine, or every machine of a job, is fit for training", doctor),
    "doctor determinism": Verb("list what can make two equal runs differ, and what to set", determinism),
}
