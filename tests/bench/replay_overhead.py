"""What recording costs a step: fingerprints of level ``light`` and ``layer``, against the same loop without them.

A GPT of 5.9 million parameters (6 layers, hidden 256, fp32) takes steps of 1,024 tokens a rank in the loop of
``mslm train``: data from a memory-mapped corpus, guard, rolling digest. Steps with and without the recorder alternate,
in both orders; the figure is the median of paired ratios with its 95 % interval (order statistics of the median), by
the clock and, for a machine that others use at the same time, in processor seconds of rank 0. The cost is
proportional to the bytes of the state, not to the tokens: fewer tokens a step, a larger share.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402

VOCAB, SEQ_LENGTH, TOKENS = 2048, 512, 1024
LEVELS = ("light", "layer")
Seconds = tuple[float, float]
"""Of a step: on the clock, and of this rank's processor."""


def overrides(corpus: Path, runs: Path, ranks: int) -> list[str]:
    """The configuration of the case."""
    return [
        "name=overhead", f"log.runs_dir={runs}", f"data.data_path={corpus}", "parallel.device=cpu",
        "model.num_layers=6", "model.hidden_size=256", "model.num_attention_heads=8", f"model.seq_length={SEQ_LENGTH}",
        f"train.global_batch_size={ranks * TOKENS // SEQ_LENGTH}", "train.eval_iters=0", "train.train_iters=1000000",
    ]  # fmt: skip


def rank(environment: RankEnvironment, corpus: Path, directory: Path, pairs: int) -> int:
    """One rank: build the loop, alternate, and let rank 0 write the times."""
    import torch
    import torch.distributed as dist

    from megatron_slm import run, run_hooks
    from megatron_slm.config.load import load
    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.parallel.layout import Layout
    from megatron_slm.replay.config import ReplayConfig
    from megatron_slm.replay.recorder import Recorder
    from megatron_slm.stages import pretrain
    from megatron_slm.train.guard import Guard
    from megatron_slm.train.loop import run_loop
    from megatron_slm.train.run_directory import RunDirectory

    resolved = load(None, overrides(corpus, directory, environment.world_size))
    config = resolved.config
    data = run.open_data(config)
    layout = Layout.from_config(config.parallel, environment.world_size)
    master = (environment.master_addr, environment.master_port)
    torch.set_num_threads(1)
    with process_groups(
        config.parallel, device="cpu", rank=environment.rank, world_size=environment.world_size, master=master
    ) as groups:
        device = torch.device("cpu")
        state, _ = run.build_state(config, data, groups, device, VOCAB)
        plan = run.step_plan(config, groups, device)
        loader = run.train_loader(config, data, groups)
        inputs = pretrain.step_inputs(loader, state, run_hooks.batch_sizes(config), plan)
        record = RunDirectory(directory / "overhead")
        interventions = run.build_interventions(resolved, data, loader, layout, record, None)
        guard = Guard(config.train)

        def steps(hooks: list[Any]) -> None:
            run_loop(
                state,
                plan,
                inputs,
                hooks,
                train_iters=state.step + 1,
                should_stop=lambda step: False,
                guard=guard,
                interventions=interventions,
            )

        recorders = {}
        for level in LEVELS:
            folder = directory / level
            recorders[level] = Recorder(
                ReplayConfig(level=level), folder, rank=environment.rank, world_size=environment.world_size
            )
            recorders[level].before_run(state)
        found = {
            level: alternate(partial(steps, [_Open(recorders[level])]), partial(steps, []), pairs, dist.barrier)
            for level in LEVELS
        }
        for recorder in recorders.values():
            recorder.after_run(state, 0)
        if environment.rank == 0:
            parameters = sum(param.numel() for chunk in state.chunks for param in chunk.parameters())
            (directory / "found.json").write_text(json.dumps({"times": found, "parameters": parameters}))
    return 0


class _Open:
    """A recorder in the middle of its run: the next step goes on writing."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return (lambda *arguments: None) if name in ("before_run", "after_run") else getattr(self._recorder, name)


def alternate(
    on: Callable[[], None], off: Callable[[], None], pairs: int, barrier: Callable[[], Any]
) -> list[tuple[Seconds, Seconds]]:
    """(on, off) of each pair; the order changes from pair to pair; the first pair warms up."""

    def timed(work: Callable[[], None]) -> Seconds:
        barrier()
        started, worked = time.perf_counter(), time.process_time()
        work()
        worked = time.process_time() - worked
        barrier()
        return time.perf_counter() - started, worked

    found = []
    for pair in range(pairs + 1):
        if pair % 2:
            second, first = timed(off), timed(on)
            found.append((first, second))
        else:
            found.append((timed(on), timed(off)))
    return found[1:]


def overhead(ratios: list[float]) -> tuple[float, float, float]:
    """``interval`` of ratios, in percent above 1."""
    low, middle, high = interval(ratios)
    return 100.0 * (low - 1.0), 100.0 * (middle - 1.0), 100.0 * (high - 1.0)


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, median, high): the median and its 95 % interval, from the binomial distribution of ranks."""
    ordered, size = sorted(values), len(values)
    half = 0.98 * size**0.5
    low, high = max(0, round(size / 2 - half) - 1), min(size - 1, round(size / 2 + half))
    return ordered[low], statistics.median(ordered), ordered[high]


def bytes_per_record(folder: Path) -> float:
    """Size of rank 0's stream over its records."""
    from megatron_slm.replay import stream

    path = stream.stream_path(folder, 0)
    records = sum(len(frame.records) for frame in stream.read_frames(path))
    return path.stat().st_size / records


def measure(ranks: int, pairs: int) -> dict[str, Any]:
    """Run the case on so many ranks."""
    directory = Path(tempfile.mkdtemp(prefix="mslm-replay-"))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            corpus = prepare_corpus(directory, VOCAB)
        work = partial(rank, corpus=corpus, directory=directory, pairs=pairs)
        code = run_local(ranks, work, preload=partial(preload, "cpu"), warm=True)
        if code:
            raise SystemExit(code)
        found: dict[str, Any] = json.loads((directory / "found.json").read_text())
        found["bytes"] = bytes_per_record(directory / "layer")
    finally:
        shutil.rmtree(directory)
    return found


def main() -> None:
    """Print a row for each level and number of ranks, and one JSON line: of one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rank and 12 pairs of steps instead of 1, 2 and 60")
    quick = parser.parse_args().quick
    line: dict[str, Any] = {"benchmark": "replay_overhead", "tokens_per_rank_step": TOKENS}
    print(f"{'ranks':>5} {'level':<6} {'step ms':>8} {'overhead':>9}  {'95 % interval':<16} {'cpu':>9}  95 % interval")
    for ranks in (1,) if quick else (1, 2):
        found = measure(ranks, 12 if quick else 60)
        suffix = "" if ranks == 1 else f"_{ranks}_ranks"
        for level in LEVELS:
            pairs = found["times"][level]
            low, middle, high = overhead([on[0] / off[0] for on, off in pairs])
            cpu_low, cpu, cpu_high = overhead([on[1] / off[1] for on, off in pairs])
            step = 1e3 * statistics.median(off[0] for _, off in pairs)
            clock = f"{middle:>+8.2f}%  {f'{low:+.2f} to {high:+.2f}':<16}"
            print(f"{ranks:>5} {level:<6} {step:>8.1f} {clock} {cpu:>+8.2f}%  {cpu_low:+.2f} to {cpu_high:+.2f}")
            line[f"{level}_cpu_pct{suffix}"] = round(cpu, 2)
            line |= {
                f"{level}_pct{suffix}": round(middle, 2),
                f"{level}_interval{suffix}": [round(low, 2), round(high, 2)],
            }
        line["parameters"], line["bytes_per_tensor_step"] = found["parameters"], round(found["bytes"], 1)
    print(json.dumps(line | {"bar": "light <= 3, layer <= 5, bytes <= 64"}))


if __name__ == "__main__":
    main()
