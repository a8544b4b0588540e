"""50 random faults against a job of two hosts: it resumes as if nothing had been, or stops with a sentence naming it.

    python tests/bench/chaos.py [--quick] [--faults 50] [--seed 0]

A fixed seed chooses what strikes and when: a rank killed, stopped for good or for a moment; the disk filled; a file of
the newest checkpoint or of the run's records truncated; the cable between the hosts cut; the checkpoint directory moved
away. After each the job is started again if ``mslm restart`` says so (an operator first frees the disk, plugs the cable
and puts the directory back). ``recovered_or_named_share``: faults after which the job went on from the newest whole
checkpoint, or stopped with a message that names the fault. ``lost_beyond_checkpoint``: steps made again that a whole
checkpoint had held. At the end every loss is compared, to the last bit, with a run that nobody disturbed, and every
checkpoint is verified. Needs root (namespaces, a small file system).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.train.manifest import problems  # noqa: E402
from megatron_slm.train.publish import published  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402
from tests.bench.two_hosts import Job, two_hosts, why_not  # noqa: E402

VOCAB, SAVE_EVERY, STEPS_A_FAULT = 512, 5, 10
DISK_MB = 64
PATIENCE_S = 240.0
HANG_MINUTES = 0.12
OVERRIDES = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.seq_length=64", "model.hidden_dropout=0.1", "train.global_batch_size=8", "train.eval_iters=0",
    f"checkpoint.save_interval={SAVE_EVERY}", "checkpoint.keep_last=3", "parallel.device=cpu",
    "parallel.tensor_model_parallel_size=2", f"parallel.hang_timeout_minutes={HANG_MINUTES}",
    "parallel.distributed_timeout_minutes=1", "log.log_interval=1", "log.progress_bar=false", "log.tensorboard=false",
    "schedule.lr_decay_style=constant",
)  # fmt: skip


@dataclass
class Fault:
    """One fault: what struck, whom or what, and what came of it."""

    kind: str
    detail: str = ""
    recovered: bool = False
    named: bool = False
    lost_beyond: int = 0
    said: str = ""

    @property
    def passed(self) -> bool:
        """Gone on, or stopped for a stated reason."""
        return self.recovered or self.named


@dataclass
class Chaos:
    """The run that is struck, and what strikes it."""

    job: Job
    disk: Path
    random: random.Random
    faults: list[Fault] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Of the run."""
        return self.job.run / "checkpoints"

    def step(self) -> int:
        """The last step recorded."""
        path = self.job.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError):
                return int(json.loads(line)["step"])
        return 0

    def newest_whole(self) -> int:
        """Step of the newest checkpoint that is what it should be; 0 without one."""
        for step, path in sorted(published(self.checkpoints).items(), reverse=True):
            if not problems(path):
                return step
        return 0

    def strike(self, kind: str) -> Fault:
        """Wait for a new checkpoint and a random moment after it, strike, and see what becomes of it."""
        began, fault = self.newest_whole(), Fault(kind)
        self.faults.append(fault)
        self._wait(lambda: self.newest_whole() > began, "a new checkpoint")
        aim = self.step() + self.random.randrange(SAVE_EVERY)
        self._wait(lambda: self.step() >= aim, "the step to strike at")
        time.sleep(self.random.random() * 0.1)
        undo = FAULTS[kind](self, fault)
        struck_at = self.step()
        if not self._stopped(kind, struck_at):
            fault.recovered = True
            return fault
        code, fault.said = self.job.settle(), self.job.said()
        undo()
        held = self.newest_whole()
        fault.named = _names(fault)
        again, sentence = self.job.asked(code)
        if not again and not fault.named:
            fault.said += sentence
            return fault
        self.job.start()
        self._wait(lambda: "start " in self.job.said() and "of this run" in self.job.said(), "the next start")
        resumed = _resumed_at(self.job.said())
        fault.lost_beyond = max(0, held - resumed)
        fault.recovered = fault.lost_beyond == 0
        return fault

    def settle(self) -> None:
        """Wait until all checkpoints that are kept are of steps made since the last fault."""
        newest = max(published(self.checkpoints))
        self._wait(lambda: min(published(self.checkpoints)) > newest, "a new checkpoint")

    def _stopped(self, kind: str, struck_at: int) -> bool:
        """Whether the job ends of the fault; False once it has gone on well beyond it."""
        enough = struck_at + 3 * SAVE_EVERY
        self._wait(lambda: self.job.ended() or self.step() >= enough, f"an end or progress after {kind}")
        return self.job.ended()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > give_up:
                raise SystemExit(f"{what} did not come in {PATIENCE_S:.0f} s:\n{self.job.said()[-3000:]}")
            if self.job.ended() and what in ("a new checkpoint", "the step to strike at", "the next start"):
                code = self.job.settle()
                raise SystemExit(f"the job ended with {code} where nothing struck:\n{self.job.said()[-3000:]}")
            time.sleep(0.02)


def _resumed_at(said: str) -> int:
    """The step that a start begins at, by its own words."""
    (line,) = [line for line in said.splitlines() if line.startswith("start ") and " of this run, at step " in line]
    return int(line.split(" of this run, at step ")[1].split(";")[0])


WORDS = {
    "stop": ("says nothing", "stopped by a signal"),
    "cut": ("network", "timed out waiting", "connection closed"),
    "disk": ("No space left",),
    "gone": ("cannot be written", "No such file", "could not be written", "is gone", "does not exist"),
    "kill": ("connection closed by peer", "its rank has ended"),
    "truncate": ("is damaged", "torn", "bytes"),
}
"""What a message that names a fault has in it."""


def _names(fault: Fault) -> bool:
    return any(words in fault.said for words in WORDS.get(fault.kind, ()))


def kill(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """One rank, at once."""
    rank = chaos.random.randrange(len(chaos.job.ranks))
    fault.detail = f"rank {rank}"
    chaos.job.ranks[rank].send_signal(SIGKILL)
    return lambda: None


def stop(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """One rank, for good."""
    rank = chaos.random.randrange(len(chaos.job.ranks))
    fault.detail = f"rank {rank}"
    chaos.job.ranks[rank].send_signal(SIGSTOP)
    return lambda: None


def pause(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """One rank, for a moment that nobody should notice."""
    rank = chaos.random.randrange(len(chaos.job.ranks))
    seconds = chaos.random.uniform(0.2, 2.5)
    fault.detail = f"rank {rank} for {seconds:.1f} s"
    chaos.job.ranks[rank].send_signal(SIGSTOP)
    time.sleep(seconds)
    chaos.job.ranks[rank].send_signal(SIGCONT)
    return lambda: None


def disk(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """Fill the file system, but for a few blocks."""
    ballast = chaos.disk / "ballast"
    left = chaos.random.randrange(0, 40) * 1024
    free = shutil.disk_usage(chaos.disk).free
    fault.detail = f"{left // 1024} KiB left"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while free > left:
            free -= stream.write(bytes(min(1 << 16, free - left)))
    return lambda: ballast.unlink(missing_ok=True)


def truncate(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """A file of the newest checkpoint or a record of the run, then a rank is killed so that somebody reads it."""
    newest = published(chaos.checkpoints)[max(published(chaos.checkpoints))]
    records = [chaos.job.run / name for name in ("metrics.jsonl", "attempts.jsonl", "restarts.jsonl", "progress.txt")]
    files = [path for path in newest.rglob("*") if path.is_file()]
    choice = files if chaos.random.random() < 0.7 else [path for path in records if path.exists()]
    path = chaos.random.choice(sorted(choice))
    kept = chaos.random.randrange(max(1, path.stat().st_size))
    fault.detail = f"{path.relative_to(chaos.job.run)} to {kept} of {path.stat().st_size} bytes"
    with path.open("r+b") as stream:
        stream.truncate(kept)
    chaos.job.ranks[0].send_signal(SIGKILL)
    return lambda: None


def cut(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """The cable."""
    chaos.job.hosts.cut()
    return chaos.job.hosts.plug


def gone(chaos: Chaos, fault: Fault) -> Callable[[], None]:
    """The run's directory, as when a file system is unmounted; nothing else can be made in its place."""
    away = chaos.job.run.with_name("away")
    chaos.job.run.rename(away)
    chaos.job.run.write_text("not a directory")

    def back() -> None:
        chaos.job.run.unlink()
        away.rename(chaos.job.run)

    return back


FAULTS: dict[str, Callable[[Chaos, Fault], Callable[[], None]]] = {
    "kill": kill, "stop": stop, "pause": pause, "disk": disk, "truncate": truncate, "cut": cut, "gone": gone,
}  # fmt: skip


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system that can be filled."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=False)


def undisturbed(work: Path, arguments: list[str]) -> dict[int, str]:
    """Losses of the same run, bits by step."""
    command = [sys.executable, "-m", "megatron_slm.cli", "train", *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the undisturbed run ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return losses(work / "quiet" / "run")


def losses(run: Path) -> dict[int, str]:
    """Bits of the loss by step."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            found[record["step"]] = record["lm_loss_bits"]
    return found


def main() -> int:
    """Print every fault, then one line of JSON; 0 when all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 faults")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if missing := why_not():
        print(json.dumps({"benchmark": "chaos", "not_run": missing}))
        return 0
    count = 5 if given.quick else given.faults
    chooser = random.Random(given.seed)
    kinds = [list(FAULTS)[index % len(FAULTS)] for index in range(count)]
    chooser.shuffle(kinds)
    with tempfile.TemporaryDirectory() as directory, two_hosts() as hosts, small_disk(Path(directory) / "disk") as disk:
        work = Path(directory)
        corpus = prepare_corpus(work, VOCAB, max_characters=3_000_000)
        run = disk / "run"
        own = [*OVERRIDES, f"data.data_path={corpus}", "name=run"]
        job = Job(hosts, [*own, f"log.runs_dir={disk}", "train.train_iters=1000000"], run, work / "outputs")
        chaos = Chaos(job, disk, chooser)
        started = time.monotonic()
        job.start()
        try:
            for kind in kinds:
                fault = chaos.strike(kind)
                print(_row(fault, time.monotonic() - started), flush=True)
                if not fault.passed:
                    print(fault.said[-2000:], flush=True)
                    if job.ended():
                        job.start()
            # What a fault has damaged is made again, or displaced by what comes after it.
            chaos.settle()
        finally:
            job.kill()
        whole = {step: problems(path) for step, path in published(chaos.checkpoints).items()}
        found = losses(run)
        last = max(found)
        expected = undisturbed(
            work, [*own, f"log.runs_dir={work / 'quiet'}", f"train.train_iters={last}", "parallel.world_size=2"]
        )
        differing = sum(found[step] != expected[step] for step in found)
    return report(chaos.faults, differing, last, sum(bool(one) for one in whole.values()))


def _row(fault: Fault, seconds: float) -> str:
    ended = "went on" if fault.recovered and not fault.said else "started again" if fault.recovered else "stopped"
    named = ", named" if fault.named else ""
    return f"[{seconds:5.0f} s] {fault.kind:9} {fault.detail:60} {ended}{named}; lost beyond {fault.lost_beyond}"


def report(faults: list[Fault], differing: int, steps: int, corrupt: int) -> int:
    """The table by kind, and the line of JSON."""
    for kind, number in Counter(fault.kind for fault in faults).items():
        own = [fault for fault in faults if fault.kind == kind]
        went_on, named = sum(fault.recovered for fault in own), sum(fault.named for fault in own)
        print(f"{kind:9} {number:3} faults: {went_on:3} recovered, {named:3} named")
    share = sum(fault.passed for fault in faults) / len(faults)
    result = {
        "benchmark": "chaos",
        "recovered_or_named_share": share,
        "recovered_share": sum(fault.recovered for fault in faults) / len(faults),
        "faults": len(faults),
        "lost_beyond_checkpoint": sum(fault.lost_beyond for fault in faults),
        "steps": steps,
        "steps_that_differ": differing,
        "corrupt_checkpoints": corrupt,
    }
    print(json.dumps(result))
    return 0 if share == 1.0 and not differing and not corrupt else 1


if __name__ == "__main__":
    raise SystemExit(main())
