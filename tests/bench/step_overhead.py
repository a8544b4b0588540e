"""What the framework costs a step: tokens/s of the training loop with logging and digests on, against a bare loop.

Both train the same core modules (4 layers, hidden 256, S 512, TP2, fp32) in the same two processes: the loop of
``mslm train`` (data from a memory-mapped corpus, order and rolling digest, console line, metrics, TensorBoard,
agreement on stopping), and ``bare_loop.py`` (tokens from memory, nothing else). Steps alternate, in both orders; the
ratio is the median of paired ratios. 1.0 means the framework costs nothing.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from tests.bench import bare_loop  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

STEPS_PER_BLOCK = 1
GLOBAL_BATCH = 4


def overrides(corpus: Path, runs: Path) -> list[str]:
    """The configuration of the case."""
    model = bare_loop.MODEL
    shape = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "seq_length")
    return [
        "name=overhead", f"log.runs_dir={runs}", f"data.data_path={corpus}", "parallel.device=cpu",
        "parallel.tensor_model_parallel_size=2", f"train.global_batch_size={GLOBAL_BATCH}", "train.eval_iters=0",
        "train.train_iters=1000000", "log.log_interval=10", "log.progress_bar=false",
        *(f"model.{key}={getattr(model, key)}" for key in shape),
    ]  # fmt: skip


def rank(environment: RankEnvironment, corpus: Path, directory: Path, blocks: int) -> int:
    """One rank: build both loops, alternate them, and let rank 0 write the times."""
    import torch
    import torch.distributed as dist

    from megatron_slm import run, run_hooks
    from megatron_slm.config.load import load
    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.parallel.layout import Layout
    from megatron_slm.stages import pretrain
    from megatron_slm.train.guard import Guard
    from megatron_slm.train.hook import Hook
    from megatron_slm.train.loop import run_loop
    from megatron_slm.train.run_directory import RunDirectory

    resolved = load(None, overrides(corpus, directory))
    config = resolved.config
    data = run.open_data(config)
    layout = Layout.from_config(config.parallel, environment.world_size)
    record = RunDirectory(directory / "overhead")
    if environment.rank == 0:
        with run.own_directory(resolved, data, environment, "cpu", fresh=True):
            pass
    master = (environment.master_addr, environment.master_port)
    with process_groups(
        config.parallel, device="cpu", rank=environment.rank, world_size=environment.world_size, master=master
    ) as groups:
        state, _ = run.build_state(config, data, groups, torch.device("cpu"), bare_loop.VOCAB)
        log = None
        if environment.rank == 1:
            log = run.open_log(config, record, layout, "cpu", bare_loop.VOCAB, step=0, loss_name="lm loss")
        plan = run.step_plan(config, groups, torch.device("cpu"))
        loader = run.train_loader(config, data, groups)
        inputs = pretrain.step_inputs(loader, state, run_hooks.batch_sizes(config), plan)
        interventions = run.build_interventions(resolved, data, loader, layout, record, log)
        guard = Guard(config.train)

        class OpenLog(Hook):
            """The log of a run; only its end is left out, because the next block goes on writing."""

            def after_step(self, state: Any, result: Any) -> None:
                assert log is not None, "only the rank that writes the log has this hook"
                log.after_step(state, result)

        hooks = [OpenLog()] if log is not None else []

        def ours() -> None:
            run_loop(
                state,
                plan,
                inputs,
                hooks,
                train_iters=state.step + STEPS_PER_BLOCK,
                should_stop=lambda step: False,
                guard=guard,
                interventions=interventions,
            )

        bare = bare_loop.build(config.parallel, groups, micro_batches=GLOBAL_BATCH, samples=1)

        def theirs() -> None:
            for _ in range(STEPS_PER_BLOCK):
                bare.step()

        # The console lines are written, as in a run, but kept out of the benchmark's table.
        with (directory / f"console-{environment.rank}.txt").open("w") as console, contextlib.redirect_stdout(console):
            times = list(alternate(ours, theirs, blocks, dist.barrier))
            if log is not None:
                log.after_run(state, 0)
        if environment.rank == 0:
            (directory / "times.json").write_text(json.dumps(times))
    return 0


def alternate(
    ours: Callable[[], None], theirs: Callable[[], None], blocks: int, barrier: Callable[[], Any]
) -> Iterator[tuple[float, float]]:
    """Seconds of (ours, theirs) per pair of blocks; the order changes from pair to pair; the first pair warms up."""

    def timed(work: Callable[[], None]) -> float:
        barrier()
        started = time.perf_counter()
        work()
        barrier()
        return time.perf_counter() - started

    for block in range(blocks + 1):
        if block % 2:
            second, first = timed(theirs), timed(ours)
            pair = (first, second)
        else:
            pair = (timed(ours), timed(theirs))
        if block:
            yield pair


def main() -> None:
    """Print the pairs' quartiles and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 pairs of steps instead of 150")
    blocks = 20 if parser.parse_args().quick else 150
    directory = Path(tempfile.mkdtemp(prefix="mslm-overhead-"))
    try:
        corpus = prepare_corpus(directory, bare_loop.VOCAB)
        code = run_local(
            2,
            partial(rank, corpus=corpus, directory=directory, blocks=blocks),
            preload=partial(preload, "cpu"),
            warm=True,
        )
        if code:
            raise SystemExit(code)
        times = json.loads((directory / "times.json").read_text())
    finally:
        shutil.rmtree(directory)
    tokens = STEPS_PER_BLOCK * GLOBAL_BATCH * bare_loop.MODEL.seq_length
    ratios = sorted(theirs / ours for ours, theirs in times)
    print(f"{'':<12} {'mslm':>10} {'bare':>10}")
    medians = [tokens / statistics.median(column) for column in zip(*times, strict=True)]
    print(f"{'tokens/s':<12} {medians[0]:>10.0f} {medians[1]:>10.0f}")
    low, middle, high = (statistics.quantiles(ratios, n=4)[i] for i in range(3))
    print(f"paired ratio: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}, {blocks} pairs")
    print(json.dumps({"benchmark": "step_overhead", "ratio": round(middle, 4), "bar": ">= 0.97", "pairs": blocks}))


if __name__ == "__main__":
    main()
