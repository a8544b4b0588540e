"""Ranks that are killed: 30 times kill -9 of one rank at a random moment, saves included, and a restart each time.

A small run over two data-parallel ranks saves after every second step; every other run does so in the background. A
process outside kills one rank. A fixed seed chooses which, and when: in half of the cases while a checkpoint is being
written, in one of six while the ranks start, else a moment after some step. "recovered" counts the kills after which
the newest checkpoint was whole and the restart went on from it (anew where none had been published yet), "bitwise" the
kills of runs that ended with every loss and every byte of their last checkpoint as the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.errors import CheckpointError  # noqa: E402
from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from megatron_slm.train.manifest import read_manifest  # noqa: E402
from megatron_slm.train.recovery import newest_whole  # noqa: E402
from megatron_slm.train.run_directory import stored_identity  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

RANKS, STEPS, KILLS_A_RUN, VOCAB = 2, 24, 5, 512
SAVE_SECONDS, STEP_SECONDS, START_SECONDS = 0.2, 0.5, 2.0
OVERRIDES = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.seq_length=64", "model.hidden_dropout=0.1", "train.global_batch_size=8", "train.eval_iters=0",
    f"train.train_iters={STEPS}", "checkpoint.save_interval=2", "checkpoint.keep_last=3", "parallel.device=cpu",
    "log.log_interval=1", "log.progress_bar=false", "log.tensorboard=false",
)  # fmt: skip


@dataclass
class Kill:
    """One kill, and the step of the whole checkpoint it left: 0 before the first, None for a damaged one."""

    promised: int | None
    in_a_save: bool
    resumed_there: bool = True


@dataclass
class Victim:
    """One run that is killed again and again."""

    directory: Path
    background: bool
    kills: list[Kill] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """What its present life has printed."""
        return self.directory.with_suffix(".output")

    def pid_file(self, rank: int) -> Path:
        """Where a rank of the present life leaves its process id."""
        return self.directory.with_suffix(f".rank{rank}")


def train(environment: RankEnvironment, corpus: Path, victim: Victim) -> int:
    """One rank of the run; the killer finds it by the file it leaves."""
    victim.pid_file(environment.rank).write_text(str(os.getpid()))
    from megatron_slm import run
    from megatron_slm.config.load import load

    own = (
        f"name={victim.directory.name}",
        f"log.runs_dir={victim.directory.parent}",
        f"data.data_path={corpus}",
        f"checkpoint.async_save={str(victim.background).lower()}",
    )
    return run.train(load(None, [*OVERRIDES, *own]), environment)


def start(corpus: Path, victim: Victim) -> int:
    """Fork a launcher with its ranks, whose output goes beside the run; returns its process id."""
    for rank in range(RANKS):
        victim.pid_file(rank).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    output = os.open(victim.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(run_local(RANKS, partial(train, corpus=corpus, victim=victim), preload=lambda: None, warm=True))


def end_of(launcher: int) -> int:
    """Wait for a launcher; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])


def kill_one(victim: Victim, launcher: int, moments: random.Random) -> int | None:
    """Wait for the chosen moment and kill the chosen rank; the run's exit code if it has ended before."""
    pid_file = victim.pid_file(moments.randrange(RANKS))
    aim = moments.choices(("start", "save", "step"), weights=(1, 3, 2))[0]
    steps = 0 if aim == "start" else moments.randint(1, 6)
    while not (pid_file.exists() and steps_taken(victim) >= steps and (aim != "save" or is_saving(victim))):
        ended, status = os.waitpid(launcher, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    longest = {"start": START_SECONDS, "save": SAVE_SECONDS, "step": STEP_SECONDS}[aim]
    time.sleep(moments.uniform(0.0, longest))
    in_a_save = is_saving(victim)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    code = end_of(launcher)
    if code == 0:  # it had ended already
        return code
    victim.kills.append(Kill(promised(victim.directory), in_a_save))
    return None


def steps_taken(victim: Victim) -> int:
    """Steps of the present life so far."""
    return victim.output.read_text().count("] iteration ")


def is_saving(victim: Victim) -> bool:
    """Whether a checkpoint is being written or moved into its place."""
    return any((victim.directory / "checkpoints").glob(".*-iter_*"))


def promised(run: Path) -> int | None:
    """The step that the next start must go on from; None where the newest checkpoint is not whole."""
    try:
        found = newest_whole(run / "checkpoints", identity=stored_identity(run))
    except CheckpointError:
        return None
    if found is None:
        return 0
    return found.state.step if found.warning is None else None


def check_start(victim: Victim) -> None:
    """Compare where the life that has ended had begun with what the kill before it promised."""
    lines = [line for line in victim.output.read_text().splitlines() if line.startswith(("resumed ", "new run "))]
    if victim.kills and lines:
        last = victim.kills[-1]
        begun = f"at step {last.promised}" if last.promised else "new run"
        last.resumed_there = last.promised is not None and begun in lines[0]


def torment(corpus: Path, victim: Victim, kills: int, moments: random.Random) -> None:
    """Start, kill and start again until the run has been killed ``kills`` times or is done; then let it finish."""
    while True:
        before = len(victim.kills)
        launcher = start(corpus, victim)
        code = kill_one(victim, launcher, moments) if before < kills else end_of(launcher)
        newest = victim.kills.pop() if len(victim.kills) > before else None
        check_start(victim)
        if newest is not None:
            victim.kills.append(newest)
        if code is not None:
            if code:
                print(victim.output.read_text()[-2000:], file=sys.stderr)
            return


def ended_alike(run: Path, reference: Path) -> bool:
    """Every loss to the last bit, and every byte of the last checkpoint but what names the run."""

    def losses(directory: Path) -> list[tuple[int, str]]:
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [(record["step"], record["lm_loss_bits"]) for record in lines]

    def files(directory: Path) -> dict[str, str]:
        stored = read_manifest(directory / "checkpoints" / f"iter_{STEPS:07d}").files
        return {name: record.sha256 for name, record in stored.items() if name != "config.yaml"}

    try:
        return losses(run) == losses(reference) and files(run) == files(reference)
    except (OSError, CheckpointError):
        return False


def main() -> None:
    """Print what became of every run and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills instead of 30")
    total = 3 if parser.parse_args().quick else 30
    directory = Path(tempfile.mkdtemp(prefix="mslm-crash-"))
    moments, victims = random.Random(1234), []
    try:
        preload("cpu")
        corpus = prepare_corpus(directory, VOCAB, max_characters=1_000_000)
        import megatron_slm.run  # noqa: F401  (once here instead of once in every rank)

        reference = Victim(directory / "undisturbed", background=False)
        torment(corpus, reference, 0, moments)
        print(f"{'run':<8} {'saves':<14} {'kills':>5} {'in a save':>9} {'recovered':>9} {'bitwise':>8}")
        recovered = bitwise = 0
        while (left := total - sum(len(victim.kills) for victim in victims)) > 0:
            victim = Victim(directory / f"run{len(victims)}", background=len(victims) % 2 == 1)
            victims.append(victim)
            torment(corpus, victim, min(left, KILLS_A_RUN), moments)
            good = sum(kill.resumed_there and kill.promised is not None for kill in victim.kills)
            alike = ended_alike(victim.directory, reference.directory)
            recovered, bitwise = recovered + good, bitwise + len(victim.kills) * alike
            saves = "background" if victim.background else "foreground"
            inside = sum(kill.in_a_save for kill in victim.kills)
            print(
                f"{len(victims) - 1:<8} {saves:<14} {len(victim.kills):>5} {inside:>9} {good:>9} {alike!s:>8}",
                flush=True,
            )
    finally:
        shutil.rmtree(directory)
    counts = {f"recovered_of_{total}": recovered, f"bitwise_of_{total}": bitwise}
    inside = sum(kill.in_a_save for victim in victims for kill in victim.kills)
    print(json.dumps({"benchmark": "crash", **counts, "bar": f"{total} and {total}", "in_a_save": inside}))


if __name__ == "__main__":
    main()
