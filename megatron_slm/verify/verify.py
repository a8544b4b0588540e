"""n ranks against one: shrink the job, run both, compare, and name the module and the axis where they differ.

Every job is forked from this process, which imports torch and core once and runs no op itself. Jobs leave their outcome
in files; comparisons are jobs too. No torch here: what needs it is imported when core has been fitted to the CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_slm.config.downscale import downscale
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.verify import axes, setting
from megatron_slm.verify.jobs import RUNS, Jobs, Plant
from megatron_slm.verify.report import Report, RunReport
from megatron_slm.verify.tolerance import FACTOR

NOTES = (
    "Dropout is off in the comparison: its masks are drawn per rank. Batches are made up, with uneven loss masks.",
    "fp64 proves the structure; a checkpoint is saved and resumed in the configured precision.",
    f"Tolerances: {FACTOR['fp64']:.0f} times ({FACTOR['bf16']:.0f} times in bf16) what it changes on one rank to move "
    "every weight by one unit in the last place and to reverse the micro-batches.",
)

_ANSWERS = "mslm generate and rollout/logp_diff_max of a run say whether generation agrees with training"
UNCOMPARED = {
    "dpo": "The reference's log-probabilities are made up: the reference model is not run.",
    "ppo": f"The policy's update is compared. Rollouts, reference, reward model and critic are not run; {_ANSWERS}.",
    "grpo": f"The policy's update is compared. Rollouts, reference and reward model are not run; {_ANSWERS}.",
    "distill": "What the teacher says is made up: the teacher is not run, and the student draws nothing.",
}
"""What of a stage is not part of the comparison."""


def verify(
    config: RunConfig, *, ranks: int = 4, plant: Plant | None = None, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Shrink a configuration to this machine and compare every shrunk run with one rank. Main thread only.

    Args:
        config: a configuration that breaks no rule, of any size.
        ranks: the most ranks of one run.
        plant: called on every rank of the parallel jobs, never in the one-rank reference, before anything is built.
        say: told what is being run.

    Raises:
        ConfigError: it cannot be shrunk to so few ranks, or one rank alone cannot run it.
        KeyboardInterrupt: a signal has ended the ranks.
    """
    small = downscale(config, ranks=ranks)
    report = verify_runs(small.runs, plant=plant, say=say)
    report.title = f"{config.name}: " + report.title
    report.changes = [
        {
            "key": change.key,
            "before": show(change.before),
            "after": " | ".join(map(show, change.after)) if change.by_run else show(change.after),
            "reason": change.reason,
        }
        for change in small.changes
        if change.key != "name"
    ]
    if small.missed:
        pairs = ", ".join(f"{first} with {second}" for first, second in small.missed)
        report.notes.insert(0, f"Not together in any run, because {ranks} ranks do not hold them: {pairs}.")
    return report


def verify_runs(
    runs: Sequence[RunConfig], *, plant: Plant | None = None, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Compare runs that are small already, each with one rank; arguments and errors as for :func:`verify`."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mslm-verify-") as directory:
        jobs = Jobs(Path(directory), plant)
        reports = [_verified(run, jobs, say) for run in runs]
    notes = [*NOTES, *[UNCOMPARED[run.stage] for run in runs[:1] if run.stage in UNCOMPARED]]
    largest = max(map(setting.world_size, runs))
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} of at most {largest} ranks, each against one rank"
    return Report(title, reports, notes=notes, seconds=time.monotonic() - started)


def described(run: RunConfig) -> str:
    """A run's layout in words."""
    parallel = run.parallel
    degrees = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.vpp_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "dp": setting.world_size(run) // parallel.model_parallel_size,
    }
    axes_text = " x ".join(f"{axis} {size}" for axis, size in degrees.items() if size > 1) or "no axis"
    options = [name for name in axes.features(run) if name not in degrees]
    ranks = setting.world_size(run)
    return ", ".join([f"{ranks} rank{'s' * (ranks > 1)} = {axes_text}", *options, setting.own_precision(run)])


def _verified(run: RunConfig, jobs: Jobs, say: Callable[[str], None]) -> RunReport:
    """One layout against one rank."""
    started = time.monotonic()
    report = RunReport(described(run), str(run.name))
    say(f"comparing {report.layout}")
    report.rows = jobs.claims(run, exact=True)
    if report.rows[0].name != RUNS:
        known = {(row.precision, row.name) for row in report.rows}
        report.rows += [row for row in jobs.claims(run, exact=False) if (row.precision, row.name) not in known]
    if not report.equal:
        say("it differs: looking for the first module and the axis")
        exact = any(row.precision == "fp64" for row in report.failed)
        if (finding := jobs.first_difference(run, report.rows, exact=exact)) is not None:
            report.first_module, report.direction = finding

        def fails(variant: RunConfig) -> bool:
            return not all(row.equal for row in jobs.claims(variant, exact=exact, quietly=True))

        report.axis = axes.smallest_failing(run, fails)
    report.seconds = time.monotonic() - started
    return report
