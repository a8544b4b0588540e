"""What the cache is worth: tokens/s of generation with it, against reading the whole prefix again for every token.

Both ask the same function for the same tokens (4 layers, hidden 256, fp32): one call for a whole completion, or one
call a token with the completion so far as its prompt. The draws depend on seed, sample and position alone, so that both
must say the same; it is checked. They alternate, in both orders; a case's ratio is the median of paired ratios, and the
headline the geometric mean over the cases: prompts of several lengths, 1 and 16 of them, on one rank and on two.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.launch.environment import RankEnvironment  # noqa: E402
from megatron_slm.launch.local import run_local, threads_per_rank  # noqa: E402
from megatron_slm.model.config import ModelConfig  # noqa: E402
from megatron_slm.parallel.config import ParallelConfig  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402

MODEL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=1024)
VOCAB = 4096


class Plan(NamedTuple):
    """What is measured: prompt lengths, prompts at a time, new tokens of each, pairs of every case."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    pairs: int


QUICK = Plan((32, 128), (1, 16), 12, 2)
FULL = Plan((32, 128, 512), (1, 16), 32, 5)


def built(parallel: ParallelConfig, groups: Any) -> list[Any]:
    """This rank's chunks with their first weights."""
    import torch

    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.train.config import PrecisionConfig, TrainConfig
    from megatron_slm.train.random_state import RandomState

    RandomState(0, dp_rank=0, pp_rank=0)
    core = transformer_config(MODEL, parallel, PrecisionConfig(), TrainConfig(), device="cpu")
    spec, norm, _ = choose_spec("cpu", MODEL, packed_documents=False)
    return build_chunks(MODEL, core, groups, vocab_size=VOCAB, seed=0, spec=(spec, norm), device=torch.device("cpu"))


def rank(environment: RankEnvironment, plan: Plan, directory: Path) -> int:
    """One rank: time every case; rank 0 writes the pairs of seconds."""
    import torch
    import torch.distributed as dist

    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.rollout.generate import complete
    from megatron_slm.rollout.sampling import Sampling

    # The parent of both jobs has imported torch for the threads of the first one.
    torch.set_num_threads(threads_per_rank(environment.world_size))
    parallel = ParallelConfig(tensor_model_parallel_size=environment.world_size)
    master = (environment.master_addr, environment.master_port)
    with process_groups(
        parallel, device="cpu", rank=environment.rank, world_size=environment.world_size, master=master
    ) as groups:
        chunks = built(parallel, groups)

        def completions(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
            found = complete(
                chunks, prompts, Sampling(max_new_tokens=new_tokens), step=0, samples=range(len(prompts)),
                groups=groups, vocab_size=VOCAB, device=torch.device("cpu"), batch_size=len(prompts),
            )  # fmt: skip
            return [list(one.tokens) for one in found]

        def recomputed(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
            texts = [list(prompt) for prompt in prompts]
            for _ in range(new_tokens):
                texts = [text + token for text, token in zip(texts, completions(texts, 1), strict=True)]
            return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

        def timed(work: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
            dist.barrier()
            started = time.perf_counter()
            said = work(prompts, plan.new_tokens)
            dist.barrier()
            return time.perf_counter() - started, said

        times: dict[str, list[tuple[float, float]]] = {}
        for length, batch in product(plan.lengths, plan.batches):
            prompts = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length)).tolist()
            completions(prompts, 2)  # warms up
            pairs = []
            for number in range(plan.pairs):
                works = (completions, recomputed) if number % 2 else (recomputed, completions)
                one, other = (timed(work, prompts) for work in works)
                if one[1] != other[1]:
                    raise SystemExit("the cache says something else than the whole prefix")
                cached, whole = (one, other) if number % 2 else (other, one)
                pairs.append((cached[0], whole[0]))
            times[f"{length} {batch}"] = pairs
        if environment.rank == 0:
            (directory / "times.json").write_text(json.dumps(times))
    return 0


def main() -> None:
    """Print a table of the cases and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short prompts and fewer pairs, below a minute")
    plan = QUICK if parser.parse_args().quick else FULL
    ratios = []
    print(f"{'ranks':>5} {'prompt':>7} {'batch':>6} {'cached tokens/s':>16} {'recomputed tokens/s':>20} {'ratio':>7}")
    for world in (1, 2):
        for case, pairs in measured(world, plan).items():
            length, batch = map(int, case.split())
            tokens = batch * plan.new_tokens
            cached, whole = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
            ratios.append(statistics.median(slow / fast for fast, slow in pairs))
            print(f"{world:>5} {length:>7} {batch:>6} {cached:>16.0f} {whole:>20.0f} {ratios[-1]:>7.2f}")
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    figures = {"cached_over_recompute": round(mean, 2), "smallest": round(min(ratios), 2), "cases": len(ratios)}
    print(json.dumps({"benchmark": "generation", **figures, "new_tokens": plan.new_tokens}))


def measured(world: int, plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """Pairs of seconds (cached, recomputed) by case, on ``world`` tensor-parallel ranks."""
    directory = Path(tempfile.mkdtemp(prefix="mslm-generation-"))
    try:
        work = partial(rank, plan=plan, directory=directory)
        if code := run_local(world, work, preload=partial(preload, "cpu"), warm=True):
            raise SystemExit(code)
        times: dict[str, list[tuple[float, float]]] = json.loads((directory / "times.json").read_text())
        return times
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
