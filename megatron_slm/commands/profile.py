"""The verbs around profiling: profile, profile report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, accepted, parser_of, path_of
from megatron_slm.profile.config import TOOLS

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.launch.environment import RankEnvironment


def profile(name: str, tokens: Sequence[str]) -> int:
    """``mslm profile``: as ``mslm train``, every rank runs this under a launcher."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] --steps FIRST[:LAST] [--ranks 0,5 | --ranks all] [--with TOOL,...]",
        "Train up to the last of some steps and profile these, in a run of its own, NAME-profile, that is started anew "
        "and saves no checkpoint. Launched as mslm train is. Some steps of a long run are profiled by mslm train with "
        "profile.profile_steps, profile_ranks and profile_tools.",
        example="mslm profile --preset tiny --data-path corpus --train-iters 100 --steps 10:12 --ranks all",
        notes=OVERRIDES,
    )
    parser.add_argument("--steps", required=True, metavar="FIRST[:LAST]", help="steps to profile, both included")
    parser.add_argument("--ranks", metavar="N,...", help="ranks to profile (default 0), or all")
    parser.add_argument(
        "--with",
        dest="tools",
        metavar="TOOL,...",
        help=f"one or several of {', '.join(TOOLS)} (default torch): torch writes profile/rank-N.json.gz, nsys-capture "
        "marks ranges and steps for Nsight Systems (launch/nsight.sh), memory records every allocation",
    )
    own, rest = parser.parse_known_args(tokens)
    chosen = [*rest, *_overrides(own)]
    from megatron_slm.launch.environment import from_environment

    environment = from_environment(os.environ)
    if environment is None:
        return _start_ranks(accepted(chosen, None), [name, *tokens])
    from megatron_slm.launch.rank import run_rank

    def entry(environment: RankEnvironment) -> int:
        return _profile_rank(accepted(chosen, environment.world_size), environment)

    return run_rank(environment, entry)


def report(name: str, tokens: Sequence[str]) -> int:
    """``mslm profile report``."""
    parser = parser_of(
        name,
        "RUN | FILE ... [--json] [--layers] [--top N]",
        "Say where the time of profiled steps went: by phase and module, communication that nothing hides, by axis, "
        "the longest kernels or operators and idle gaps, and which rank the others wait for. Reads Chrome traces of "
        "torch's profiler and SQLite exports of Nsight Systems (nsys export --type sqlite), one a rank.",
        example="mslm profile report runs/tiny-profile",
    )
    parser.add_argument("paths", nargs="+", metavar="RUN | FILE", type=path_of, help="a run's directory, or its traces")
    parser.add_argument("--json", action="store_true", help="print every number instead of tables")
    parser.add_argument("--layers", action="store_true", help="show every layer by itself")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of a table (default 10)")
    own = parser.parse_args(tokens)
    from megatron_slm.profile.compare import report_of, traces_of
    from megatron_slm.profile.report import text_of

    paths: list[Path] = own.paths
    found = report_of(traces_of(paths), gaps=max(own.top, 1))
    print(found.to_json() if own.json else text_of(found, top=max(own.top, 1), layers=own.layers))
    return EXIT_OK


def _overrides(own: argparse.Namespace) -> list[str]:
    """The options as keys of the configuration."""
    given = {"profile_steps": own.steps, "profile_ranks": own.ranks, "profile_tools": own.tools}
    return [f"profile.{key}={value}" for key, value in given.items() if value is not None]


def _start_ranks(resolved: Resolved, command: Sequence[str]) -> int:
    """Start the ranks on this machine and wait for them."""
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device, preload

    parallel = resolved.config.parallel

    def preload_run() -> None:
        preload("cpu")
        import torch._dynamo  # noqa: F401  torch's first optimizer asks for it

        import megatron_slm.run_profile  # noqa: F401

    def entry(environment: RankEnvironment) -> int:
        return _profile_rank(resolved, environment)

    return run_local(
        parallel.world_size or parallel.smallest_world_size,
        entry,
        preload=preload_run,
        warm=lambda: choose_device(parallel.device) == "cpu",
        command=[sys.executable, "-m", "megatron_slm.cli", *command],
    )


def _profile_rank(resolved: Resolved, environment: RankEnvironment) -> int:
    from megatron_slm.parallel.device import choose_device, preload

    # Core must fit the device before any of our modules takes a name out of it.
    preload(choose_device(resolved.config.parallel.device))
    from megatron_slm import run_profile

    return run_profile.profiled(resolved, environment)


VERBS: Mapping[str, Verb] = {
    "profile": Verb("profile some steps of a training", profile),
    "profile report": Verb("say where the time of profiled steps went", report),
}
