"""The verbs on recordings: what was recorded, and where two runs part."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.commands import downscaled
from megatron_slm.commands.command import (
    EXIT_OK,
    OVERRIDES,
    Verb,
    accepted,
    parser_of,
    path_of,
    resolve,
    stopped_by_sigterm,
)
from megatron_slm.commands.training import start_ranks
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.replay.capsule import Capsule
    from megatron_slm.replay.step import ReplayedStep

EXIT_DIFFERENT = 1
STDERR = 2


def replay_show(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay show``: what a run has recorded of itself."""
    parser = parser_of(
        name,
        "RUN [--step N] [--rank R]",
        "Show what a run has recorded: its steps, or what one rank did in one step: which samples, then a fingerprint "
        "of every tensor in the order of execution, and the line of source of every operation that was recorded.",
        example="mslm replay show runs/kjv --step 20 --rank 3",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run that was recorded")
    parser.add_argument("--step", type=int, metavar="N", help="every record of this step")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of this rank (default 0)")
    own = parser.parse_args(tokens)
    from megatron_slm.replay.capsule import Capsule
    from megatron_slm.replay.report import capsule_text
    from megatron_slm.replay.show import step_text

    capsule = Capsule.of(own.run)
    print(capsule_text(capsule) if own.step is None else step_text(capsule, own.step, own.rank))
    return EXIT_OK


def replay_diff(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay diff``: the first place where two runs part, and why."""
    parser = parser_of(
        name,
        "A B [--json] [--jsonl FILE]",
        "Name the first step, rank, phase, module and tensor in which two recorded runs of one layout differ, whether "
        "its inputs were equal, and what kind of cause that has. Exit code 0 if every step that both have recorded is "
        "equal, 1 if not.",
        example="mslm replay diff runs/first runs/second",
    )
    parser.add_argument("runs", nargs=2, type=path_of, metavar="RUN", help="directories of runs that were recorded")
    parser.add_argument("--json", action="store_true", help="print JSON lines; nothing where the runs are equal")
    parser.add_argument("--jsonl", type=path_of, metavar="FILE", help="write every record that differs, a line each")
    own = parser.parse_args(tokens)
    from megatron_slm.replay import report
    from megatron_slm.replay.capsule import Capsule
    from megatron_slm.replay.cause import cause
    from megatron_slm.replay.diff import compare
    from megatron_slm.replay.differing import write_differing

    first, second = map(Capsule.of, own.runs)
    comparison = compare(first, second)
    found = comparison.divergence
    if own.jsonl is not None:
        count = write_differing(first, second, own.jsonl)
        print(f"{own.jsonl}: {count} differing record(s)", file=sys.stderr)
    if found is None:
        if own.json and comparison.alone:
            print("\n".join(comparison.alone), file=sys.stderr)
        if not own.json:
            print(f"equal: every recorded step that both runs have, on every rank\n{report.compared_text(comparison)}")
        return EXIT_OK
    why = cause(first, second, found)
    text = f"{report.divergence_text(found, why)}\n{report.compared_text(comparison)}"
    print(report.divergence_json(found, why) if own.json else text)
    return EXIT_DIFFERENT


def replay_resume_check(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay resume-check``: whether a resumed run makes the steps that the run would have made."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] --at K [--steps M] [--downscale [--ranks N]]",
        "Run a configuration to step K + M, resume it from its checkpoint of step K in a second run, and compare every "
        "recorded tensor of the M steps on every rank. The runs lie in a directory of their own, NAME-resume-check, "
        "and are started anew each time. Exit code 0 if all is equal to the last bit, 1 if not.",
        example="mslm replay resume-check examples/llama3-405b/config.yaml --at 3 --downscale",
        notes=OVERRIDES,
    )
    parser.add_argument("--at", type=int, required=True, metavar="K", help="completed steps of the checkpoint")
    parser.add_argument("--steps", type=int, default=3, metavar="M", help="steps behind it (default: %(default)s)")
    downscaled.add_options(
        parser.add_mutually_exclusive_group(),
        parser,
        "shrink the job to a few ranks of this machine with its structure kept, and check each of the small runs",
    )
    own, rest = parser.parse_known_args(tokens)
    _refuse_launcher(name)
    from megatron_slm.replay.resume import require_steps, resume_check

    def check(resolved: Resolved) -> int:
        found = resume_check(resolved, _start, at=own.at, steps=own.steps)
        print(found.render(), flush=True)
        return EXIT_OK if found.equal else EXIT_DIFFERENT

    if (ranks := downscaled.ranks_of(own)) is not None:
        return downscaled.each(resolve(rest), ranks, check)[0]
    resolved = accepted(rest, None)
    require_steps(resolved, own.at, own.steps)
    return check(resolved)


def replay_step(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay step``: a recorded step made again."""
    parser = parser_of(
        name,
        "RUN N [--capture op] [--kept-batches] [--code DIR] [--force]",
        "Make step N of a recorded run again, from the nearest checkpoint before it, with the configuration and the "
        "number of threads that were recorded, and compare it with the recording. The run's directory is enough: where "
        "its corpora are gone, the batches that it has kept are read. Refused where program, versions or machine are "
        "not those of the recording. The replay lies in a directory of its own, RUN-replay. Exit code 0 if it is equal "
        "to the last bit, 1 if not.",
        example="mslm replay step runs/kjv 120 --capture op",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run that was recorded")
    parser.add_argument("step", type=int, metavar="N")
    parser.add_argument("--capture", choices=("op",), help="record every operation of step N")
    parser.add_argument("--code", type=path_of, metavar="DIR", help="checkout whose program makes the step again")
    parser.add_argument("--kept-batches", action="store_true", help="read them even where the corpora are there")
    parser.add_argument("--force", action="store_true", help="replay although program, versions or machine differ")
    own = parser.parse_args(tokens)
    _refuse_launcher(name)
    from megatron_slm.replay import requirements, source, step
    from megatron_slm.replay.capsule import Capsule

    recording = Capsule.of(own.run)
    step.require_recorded(recording, own.step)
    before, package = step.begins_from(recording, own.step), source.package_in(own.code)
    other = requirements.require(recording, own.step, before, force=own.force, package=package)
    for line in other:
        print(f"although other: {line}", flush=True)
    with stopped_by_sigterm():
        start = _start_with(step.threads(recording, own.step), code=own.code)
        found = step.replay_step(recording, own.step, start, capture=own.capture, kept=own.kept_batches)
    print(found.render())
    return EXIT_OK if found.equal else EXIT_DIFFERENT


def replay_bisect(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay bisect``: the first operation in which two runs part."""
    parser = parser_of(
        name,
        "A B [--code DIR DIR]",
        "Name the first difference of two recorded runs of one layout down to the operation and the line of source "
        "that called it: by their recordings, then by making the step in which they part again, once for each. Where "
        "the runs were made by other programs, --code names a checkout for each. Runs without a recording are compared "
        "by their checkpoints, the steps between are made again, and the one in which they part once more. The replays "
        "lie in A-replay and B-replay. Exit code 0 if the runs are equal, 1 if not.",
        example="mslm replay bisect runs/first runs/second",
    )
    parser.add_argument("runs", nargs=2, type=path_of, metavar="RUN", help="directories of runs that were recorded")
    parser.add_argument("--code", nargs=2, type=path_of, metavar="DIR", help="checkouts that make A and B again")
    own = parser.parse_args(tokens)
    _refuse_launcher(name)
    from megatron_slm.replay import bisect, checkpoints_only
    from megatron_slm.replay.capsule import Capsule

    if checkpoints_only.without_recording(own.runs):
        return _bisect_checkpoints(own.runs, own.code)

    programs = own.code or (None, None)

    def replay(recording: Capsule, number: int) -> ReplayedStep:
        for one, code in zip((first, second), programs, strict=True):
            bisect.require_program(one, number, code)
        return _operations(recording, number, programs[recording == second])

    with stopped_by_sigterm():
        first, second = map(Capsule.of, own.runs)
        found = bisect.bisect(first, second, replay)
    print(found.render())
    return EXIT_OK if found.divergence is None else EXIT_DIFFERENT


def _operations(recording: Capsule, number: int, code: Path | None) -> ReplayedStep:
    """A recorded step made again by a program, every operation recorded."""
    from megatron_slm.replay import step

    start = _start_with(step.threads(recording, number), stdout=STDERR, code=code)
    return step.replay_step(recording, number, start, capture=step.OPERATIONS)


def _bisect_checkpoints(runs: Sequence[Path], code: Sequence[Path] | None) -> int:
    """The same of runs of which one at least has no recording."""
    from megatron_slm.replay import checkpoints_only
    from megatron_slm.replay.checkpoints_only import Unrecorded

    opened = []
    for path, checkout in zip(runs, code or (None, None), strict=True):
        start = _start_with(checkpoints_only.threads(path), stdout=STDERR, code=checkout)
        opened.append(Unrecorded(path, checkpoints_only.opened(path), start, checkout))

    def replay(recording: Capsule, number: int) -> ReplayedStep:
        (made,) = (one for one in opened if one.place in recording.folder.parents)
        return _operations(recording, number, made.code)

    with stopped_by_sigterm():
        found = checkpoints_only.bisect_checkpoints(*opened, replay=replay)
    print(found.render())
    return EXIT_OK if found.plan is None else EXIT_DIFFERENT


def replay_sdc(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay sdc``: results that were computed wrongly, once or always."""
    parser = parser_of(
        name,
        "RUN --every S [--rotate K ... | --same-slots] [--force]",
        "Make every S-th step of a recorded run again, on the same slots (process places of this machine) and with all "
        "ranks moved to other slots, and compare. A result that one of them alone has is a transient fault, named by "
        "rank and slot; a slot that is wrong whichever rank it runs is a persistent one. Where that does not tell, up "
        "to two further replays are made. Exit code 0 if all is equal to the last bit, 1 if not.",
        example="mslm replay sdc runs/kjv --every 100",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run that was recorded")
    parser.add_argument("--every", type=int, required=True, metavar="S")
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--rotate", type=int, nargs="+", metavar="K", default=[1], help="move ranks by K slots, a replay for each K"
    )
    places.add_argument("--same-slots", action="store_true", help="move none: persistent faults are not found so")
    parser.add_argument("--force", action="store_true", help="replay although program, versions or machine differ")
    own = parser.parse_args(tokens)
    if own.every < 1:
        raise ConfigError(f"--every {own.every}: steps are counted from 1 on; give 1 for all of them.")
    _refuse_launcher(name)
    from megatron_slm.replay import requirements, sdc, step
    from megatron_slm.replay.capsule import Capsule

    recording = Capsule.of(own.run)

    def replay(number: int, attempt: int, places: int) -> step.ReplayedStep:
        if attempt == 1:
            requirements.require(recording, number, step.begins_from(recording, number), force=own.force)
        start = _start_with(step.threads(recording, number), rotation=places)
        return step.replay_step(recording, number, start, attempt=attempt)

    with stopped_by_sigterm():
        chosen, findings = sdc.hunt(recording, own.every, replay, rotations=() if own.same_slots else own.rotate)
    for finding in findings:
        print(finding)
    print(f"{len(chosen)} step(s) from {chosen[0]} to {chosen[-1]} made again, {len(findings)} difference(s)")
    return EXIT_DIFFERENT if findings else EXIT_OK


def replay_layout_diff(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay layout-diff``: two runs whose ranks have cut the model otherwise."""
    parser = parser_of(
        name,
        "A B [--at STEP] [--reference RUN] [--no-origin] [--json]",
        "Compare two runs of one configuration under different layouts: the samples, loss and gradient norm of each "
        "step, and every tensor of a common checkpoint by its global name. What counts as equal is measured: A is made "
        "again from weights moved by one unit in the last place, in A-layout-diff, or --reference names such a run. "
        "Where something differs, the first two steps of both runs are made again there and held against one rank, to "
        "name the module. Exit code 0 if all is within tolerance, 1 if not.",
        example="mslm replay layout-diff runs/tp1 runs/tp2 --at 10",
    )
    parser.add_argument("runs", nargs=2, type=path_of, metavar="RUN", help="directories of runs")
    parser.add_argument("--at", type=int, metavar="STEP", help="common checkpoint to end at (default: the newest)")
    parser.add_argument("--reference", type=path_of, metavar="RUN", help="A under rounding errors, made before")
    parser.add_argument("--no-origin", action="store_true", help="make no steps again to find where they part")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    own = parser.parse_args(tokens)
    _refuse_launcher(name)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.replay.layouts import layout_diff
    from megatron_slm.replay.perturbed import perturbed_run
    from megatron_slm.verify.tolerance import Unit
    from megatron_slm.verify.witnessed import origins

    first, second = own.runs
    start = _start_with(int(os.environ.get("OMP_NUM_THREADS", "1")), stdout=STDERR)

    def reference(steps: Sequence[int]) -> Path:
        return own.reference or perturbed_run(first, steps, start)

    locate = None if own.no_origin else functools.partial(origins, start=start)
    with stopped_by_sigterm():
        found = layout_diff(
            (first, second), reference, lambda precision: Unit(precision).tolerance, at=own.at, locate=locate
        )
    print(found.to_json() if own.json else found.render())
    return EXIT_OK if found.equal else EXIT_DIFFERENT


def _start(resolved: Resolved) -> int:
    """Start the ranks of a run; those that cannot be forked read its configuration from a file beside it."""
    command = ["train", str(_written(resolved))]
    return start_ranks(resolved, command, argparse.Namespace(fresh=False, lr_range_test=None))


def _start_with(
    threads: int, stdout: int | None = None, rotation: int | None = None, code: Path | None = None
) -> Callable[[Resolved], int]:
    """The same in a process of its own: torch counts its threads once, when it is first imported.

    Args:
        rotation: slots by which every rank is moved on; its process is bound to its slot then.
        stdout: file descriptor that takes what the run prints; default this process's standard output.
        code: checkout whose program runs; default this one's.
    """
    program = ["-m", "megatron_slm.cli"]
    if code is not None:
        # -m would look in the current directory first, to which the configuration's paths are relative.
        place = str(code.resolve())
        program = ["-c", f"import sys; sys.path[0] = {place!r}; from megatron_slm import cli; sys.exit(cli.main())"]

    def start(resolved: Resolved) -> int:
        command = [sys.executable, *program, "train", str(_written(resolved))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if rotation is not None:
            environment["MSLM_ROTATE_RANKS"] = str(rotation)
        sys.stdout.flush()
        return subprocess.run(command, env=environment, stdout=stdout, check=False).returncode

    return start


def _written(resolved: Resolved) -> Path:
    """The configuration in a file beside its run."""
    file = Path(resolved.config.log.runs_dir) / f"{resolved.config.name}.yaml"
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    return file


def _refuse_launcher(name: str) -> None:
    """Refuse to be one rank of several.

    Raises:
        ConfigError: a launcher has started this process.
    """
    from megatron_slm.launch.environment import from_environment

    if (environment := from_environment(os.environ)) is not None:
        raise ConfigError(
            f"mslm {name} starts ranks of its own on this machine, but {environment.launcher} started this process as "
            "one. Run it without a launcher."
        )


VERBS: Mapping[str, Verb] = {
    "replay show": Verb("show what a run has recorded of itself", replay_show),
    "replay diff": Verb("name the first place where two recorded runs part, and why", replay_diff),
    "replay resume-check": Verb("prove that a resumed run goes on as it would have gone on", replay_resume_check),
    "replay step": Verb("make a recorded step again, and compare", replay_step),
    "replay bisect": Verb("name the first operation in which two recorded runs part", replay_bisect),
    "replay sdc": Verb("make recorded steps again, also on permuted ranks, to find wrong results", replay_sdc),
    "replay layout-diff": Verb("compare runs of two layouts, within measured rounding", replay_layout_diff),
}
