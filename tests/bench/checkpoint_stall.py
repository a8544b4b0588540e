"""What a save costs the training: steps' worth of time lost to a checkpoint of about 100 MB, in the background or not.

Two data-parallel ranks train a model whose checkpoint is about 100 MB (weights, master weights, two moments, fp32).
Blocks of steps take turns: without a save, with one on the training thread after the first step, with one in the
background. A block in the background goes on until its checkpoint is published, so everything the writing takes from
the steps beside it (processor, memory, interpreter) is counted. The cost is the block's time above that of as many
normal steps, in normal steps; each block is compared with the normal one beside it, and the median is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

VOCAB, STEPS_PER_BLOCK = 4096, 4
MODES = ("normal", "sync", "async")
OVERRIDES = (
    "name=stall", "model.num_layers=3", "model.hidden_size=320", "model.num_attention_heads=5",
    "model.num_query_groups=5", "model.ffn_hidden_size=800", "model.seq_length=256", "train.global_batch_size=8",
    "train.eval_iters=0", "train.train_iters=1000000", "parallel.device=cpu", "checkpoint.keep_last=1",
    "log.progress_bar=false", "log.tensorboard=false",
)  # fmt: skip


def rank(environment: RankEnvironment, corpus: Path, directory: Path, rounds: int) -> int:
    """One rank: take the blocks in turns; rank 0 writes what they took."""
    from megatron_slm import run
    from megatron_slm.config.load import load

    given = [*OVERRIDES, f"log.runs_dir={directory}", f"data.data_path={corpus}"]
    resolved = {mode: load(None, [*given, f"checkpoint.async_save={mode == 'async'}".lower()]) for mode in MODES}
    with (
        (directory / f"console-{environment.rank}.txt").open("w") as console,
        contextlib.redirect_stdout(console),
        run.assembled(resolved["sync"], environment, fresh=True) as parts,
    ):
        blocks = Blocks(parts, resolved)
        blocks.take("normal")  # the first steps warm up
        blocks.take("sync")
        times = []
        for number in range(rounds):
            order = MODES if number % 2 else tuple(reversed(MODES))
            times.append({mode: blocks.take(mode) for mode in order})
        blocks.close()
    if environment.rank == 0:
        size = sum(file.stat().st_size for file in (directory / "stall" / "checkpoints").rglob("*.distcp"))
        (directory / "times.json").write_text(json.dumps({"bytes": size, "rounds": times}))
    return 0


class Blocks:
    """Steps of one run, with and without a save among them."""

    def __init__(self, parts: Any, resolved: dict[str, Any]) -> None:
        from megatron_slm.run_beside import inputs_of
        from megatron_slm.run_hooks import build_interventions, checkpoint_hook
        from megatron_slm.train.guard import Guard

        self._parts, self._inputs = parts, inputs_of(parts)
        shared = (parts.data, parts.loader, parts.layout, parts.directory, None)
        self._interventions = build_interventions(parts.resolved, *shared)
        self._guard = Guard(parts.resolved.config.train)
        self._hooks = {
            mode: checkpoint_hook(resolved[mode], parts.data, parts.layout, parts.directory, None)
            for mode in ("sync", "async")
        }
        for hook in self._hooks.values():
            hook.before_run(parts.state)

    def take(self, mode: str) -> tuple[float, int]:
        """Seconds and steps of one block."""
        import torch.distributed as dist

        hook = self._hooks.get(mode)
        dist.barrier()
        started, steps = time.perf_counter(), 0
        while steps < STEPS_PER_BLOCK or (hook is not None and self._in_flight(hook)):
            if hook is not None:
                hook.interval = 1 if steps == 0 else None  # saves after the block's first step
            self._step([hook] if hook is not None else [])
            steps += 1
        dist.barrier()
        return time.perf_counter() - started, steps

    def close(self) -> None:
        """End the threads that write."""
        for hook in self._hooks.values():
            hook.settle()

    def _step(self, hooks: list[Any]) -> None:
        from megatron_slm.train.loop import run_loop

        state = self._parts.state
        run_loop(
            state,
            self._parts.plan,
            self._inputs,
            [],
            train_iters=state.step + 1,
            should_stop=lambda step: False,
            guard=self._guard,
            interventions=self._interventions,
        )
        for hook in hooks:  # not by the loop, whose end would save once more
            hook.after_step(state, None)

    def _in_flight(self, hook: Any) -> bool:
        from megatron_slm.parallel.groups import any_rank

        return any_rank(hook.is_writing(), self._parts.plan.device)


def main() -> None:
    """Print what a save takes, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 10")
    rounds = 2 if parser.parse_args().quick else 10
    directory = Path(tempfile.mkdtemp(prefix="mslm-stall-"))
    try:
        corpus = prepare_corpus(directory, VOCAB)
        entry = partial(rank, corpus=corpus, directory=directory, rounds=rounds)
        if code := run_local(2, entry, preload=partial(preload, "cpu"), warm=True):
            raise SystemExit(code)
        measured = json.loads((directory / "times.json").read_text())
    finally:
        shutil.rmtree(directory)
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    steps = []
    for times in measured["rounds"]:
        seconds, count = times["normal"]
        steps.append(seconds / count)
        for mode, lost in stalls.items():
            seconds, count = times[mode]
            lost.append(seconds / steps[-1] - count)
    step = statistics.median(steps)
    print(f"state {measured['bytes'] / 1e6:.0f} MB, normal step {1e3 * step:.0f} ms, {len(steps)} rounds")
    print(f"{'save':<12} {'stall (steps)':>14} {'worst':>8} {'stall (ms)':>11}")
    for mode, lost in stalls.items():
        middle = statistics.median(lost)
        print(f"{mode:<12} {middle:>14.2f} {max(lost):>8.2f} {1e3 * middle * step:>11.0f}")
    stall = {mode: round(statistics.median(lost), 3) for mode, lost in stalls.items()}
    figures = {"stall_steps": stall["async"], "sync_stall_steps": stall["sync"], "step_ms": round(1e3 * step, 1)}
    megabytes = round(measured["bytes"] / 1e6)
    print(json.dumps({"benchmark": "checkpoint_stall", **figures, "bar": "<= 1", "state_mb": megabytes}))


if __name__ == "__main__":
    main()
