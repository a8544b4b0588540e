"""What ``launch/slurm.sh`` asks before, at the start and at the end of a job: the verbs ``mslm slurm ...``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of
from megatron_slm.commands.slurm_check import refusal
from megatron_slm.commands.slurm_job import Job, array_indices, budget_left, job_of, jobs_of, make, node_hours, split
from megatron_slm.errors import ConfigError
from megatron_slm.launch import allocation as slurm
from megatron_slm.launch.allocation import Allocation
from megatron_slm.launch.job_environment import job_variables
from megatron_slm.launch.step import meeting_port, step_command
from megatron_slm.survival import restart

EXIT_LEFT = 1
"""The job is not to be started again."""
CHECKED_VARIABLE = "MSLM_CHECKED"
_KILLED_BY_USR1 = 138
_WARNING_MINUTES = 3.0
"""Before the time limit, Slurm's own warning comes two minutes (at most three) before it; the run stops earlier."""
_ENDED = "ended"
"""What the script leaves in the folder of a start whose end it has seen."""


def submit(name: str, tokens: Sequence[str]) -> int:
    """``mslm slurm submit``: refuse a job that cannot start or fit, or hand it to ``sbatch``."""
    parser_of(
        name,
        "SCRIPT [options of sbatch] CONFIG [key=value | --flag ...]",
        "Check a job for the nodes that it asks for, and hand it to sbatch if it can start and fits; exit code 2 and "
        "no job if not.",
        example="mslm slurm submit launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=1-0 config.yaml",
    ).parse_known_args([token for token in tokens if token in ("-h", "--help")])
    options, rest = split(tokens[1:])
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch on PATH: this machine has no Slurm. Use its login node.")
    wanted = slurm.of_options(options)
    jobs = jobs_of(rest, array_indices(options))
    if code := refusal(jobs, wanted):
        return code
    added = [] if any(option.startswith(("-J", "--job-name")) for option in options) else [f"--job-name={jobs[0].name}"]
    if not any(option.startswith(("-n", "--ntasks")) for option in options):
        added.append(f"--ntasks-per-node={wanted.ranks_per_node}")
    os.environ[CHECKED_VARIABLE] = str(wanted.world_size)
    sys.stdout.flush()
    os.execvp("sbatch", ["sbatch", *options, *added, tokens[0], *rest])


def prepare(name: str, tokens: Sequence[str]) -> int:
    """``mslm slurm prepare``: inside an allocation, the shell lines that ``launch/slurm.sh`` starts its ranks with."""
    parser_of(
        name,
        "CONFIG [key=value | --flag ...]",
        "Inside an allocation: check the job unless that was done, and print shell lines with its variables and the "
        "command that starts its ranks. Exit code 2 if it cannot start or fit, 1 if it must not be started again.",
        example="mslm slurm prepare config.yaml",
    ).parse_known_args([token for token in tokens if token in ("-h", "--help")])
    environ = os.environ
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError("this is no allocation of Slurm (SLURM_JOB_ID is not set): use launch/slurm.sh.")
    own = slurm.of_environment(environ)
    index = environ.get("SLURM_ARRAY_TASK_ID")
    job = job_of(tokens, int(index) if index is not None else None)
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    if not restarts and environ.get(CHECKED_VARIABLE) != str(own.world_size) and (code := refusal([job], own)):
        return code
    if restarts and _given_up(job, restarts):
        return EXIT_LEFT
    print("\n".join(_lines(job, own, restarts)))
    return EXIT_OK


def ended(name: str, tokens: Sequence[str]) -> int:
    """``mslm slurm ended``: whether a job whose ranks have ended goes back to the queue."""
    parser = parser_of(
        name,
        "RUN --code N [--asked]",
        "Note that the ranks of a run have ended, and say whether the job goes back to the queue: exit code 0 if so, 1 "
        "and why if not (crash loop, budget).",
        example="mslm slurm ended runs/kjv --code 75",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's directory")
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--asked", action="store_true", help="the ranks were asked to stop")
    own = parser.parse_args(tokens)
    # Asked before their first step, the ranks had nothing to save and no hand for the signal.
    code = restart.EXIT_STOPPED if own.asked and own.code == _KILLED_BY_USR1 else own.code
    decision = restart.after_end(own.run, code)
    if not decision.again:
        print(decision.reason)
        return EXIT_LEFT
    left = budget_left(own.run, int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), os.environ)
    if left is not None and left <= 0:
        print(f"the budget is used up ({node_hours(own.run, 1):.2f} hours of every node, {decision.reason})")
        return EXIT_LEFT
    print(f"{decision.wait_s:.0f} s: {decision.reason}")
    return EXIT_OK


def _given_up(job: Job, restarts: int) -> bool:
    """Whether the job is not started again, where nobody has seen its last start end: its node failed."""
    before = job.folder(os.environ["SLURM_JOB_ID"], restarts - 1)
    if not before.is_dir() or (before / _ENDED).exists():
        return False
    cause = "a node failed, or the job was requeued from outside"
    decision = restart.after_end(job.directory, EXIT_LEFT, cause=cause)
    print(f"mslm: {decision.reason}", file=sys.stderr)
    return not decision.again


def _lines(job: Job, own: Allocation, restarts: int) -> Iterator[str]:
    """Shell lines: the job's variables with their reasons, its folder, its command."""
    environ, job_id = os.environ, os.environ["SLURM_JOB_ID"]
    cpus = int(environ.get("SLURM_CPUS_PER_TASK") or 0)
    cpus = cpus or int(environ.get("SLURM_CPUS_ON_NODE") or own.ranks_per_node) // own.ranks_per_node
    for variable in job_variables(job.resolved.config, own.device, max(1, cpus), environ):
        yield f"export {variable.name}={shlex.quote(variable.value)}  # {variable.reason}"
    address = environ.get("MASTER_ADDR") or slurm.first_address(environ["SLURM_JOB_NODELIST"])
    port = environ.get("MASTER_PORT") or meeting_port(address, int(job_id), restarts)
    yield f"export MASTER_ADDR={shlex.quote(address)}  # where rank 0 is: the first node, by its address"
    yield f"export MASTER_PORT={port}  # another for every job and restart"
    folder = job.folder(job_id, restarts)
    make(folder)
    yield f"export MSLM_JOB_FOLDER={shlex.quote(str(folder))}  # one file for every rank and every node"
    yield f"run={shlex.quote(str(job.directory))}"
    yield f"ranks_per_node={own.ranks_per_node}"
    program = environ.get("MSLM_CONTAINER_PROGRAM", "mslm") if environ.get("MSLM_CONTAINER") else environ["MSLM"]
    words = [program] if os.path.exists(program) else shlex.split(program)
    tokens = [*job.tokens(), *_limit(job, own)]
    yield f"step=({shlex.join(step_command(own, [*words, 'train', *tokens], environ))})"


def _limit(job: Job, own: Allocation) -> Iterator[str]:
    """When the run stops by itself: before the job's time limit, and when its budget is used up."""
    if job.resolved.provenance["train.exit_duration_in_mins"] != "default":
        return
    limits = []
    left = slurm.minutes_left(os.environ["SLURM_JOB_ID"])
    if left is not None and left > 2 * _WARNING_MINUTES:
        limits.append(left - _WARNING_MINUTES)
    budget = budget_left(job.directory, own.nodes, os.environ)
    if budget is not None:
        limits.append(60 * max(0.0, budget) / own.nodes)
    if limits:
        yield f"train.exit_duration_in_mins={min(limits):.1f}"


VERBS: Mapping[str, Verb] = {
    "slurm submit": Verb("check a job and hand it to sbatch (launch/slurm.sh)", submit),
    "slurm prepare": Verb("inside an allocation: what launch/slurm.sh starts (for that script)", prepare),
    "slurm ended": Verb("does a job whose ranks have ended go back to the queue? (for that script)", ended),
}
