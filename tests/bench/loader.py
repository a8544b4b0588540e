"""The loader beside megatron-core's GPTDataset, DALI and a plain memory map, on the same tokens: speed and start-up.

    python tests/bench/loader.py [--quick]

All give micro-batches of ``BATCH`` samples of ``SEQ_LENGTH`` tokens in this process, without workers. The loader, alone
and through a DALI pipeline on the CPU (``data.loader: dali``; left out where DALI is not installed), and ``GPTDataset``
(with torch's own collate) give tokens, labels, loss mask and position ids; the memory map gives random rows, widened,
as tokens and labels, and no mask, no positions, no order. Rounds alternate between all of them; a ratio is the median
over rounds. Start-up is from opening the files to the first micro-batch, with the files in the page cache:
``GPTDataset`` once builds its indices (a new run) and once finds them cached (the same run again).

``tokens_per_second_ratio_*``: above 1 the loader is faster. ``startup_ratio_*``: below 1 it starts sooner. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from megatron_slm.config import rules_packages
from megatron_slm.data.batch import Batch
from megatron_slm.data.config import DataConfig
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.data.loader_dali import DaliLoader
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.shards import ShardWriter

SEQ_LENGTH, BATCH, SEED = 1024, 8, 1234
VOCAB, EOD, FIRST_ID = 32_000, 2, 3
DOCUMENT_TOKENS = 1500
STEPS = 100
LOADER, MIXTURE, CORE, MAP = "loader", "loader, two sources", "core's GPTDataset", "memory map, random rows"
DALI = "loader through DALI"

Reader = Callable[[], Iterator[Any]]


def main() -> None:
    """Print both tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller corpus and fewer rounds, within a minute")
    quick: bool = parser.parse_args().quick
    logging.getLogger("megatron").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    num_tokens, rounds = (1 << 23, 9) if quick else (1 << 27, 31)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write(directory, num_tokens)
        here = [name for name in READERS if name != DALI or rules_packages.installed("nvidia.dali")]
        seconds = alternate({name: READERS[name](directory) for name in here}, rounds)
        started = startup(directory, rounds)
    print(f"{num_tokens:,} tokens, {BATCH} x {SEQ_LENGTH} a micro-batch, medians of {rounds} alternating rounds")
    print(f"{'reader':<28}{'tokens/s':>12}{'loader is':>12}")
    for name, values in seconds.items():
        speed = STEPS * BATCH * SEQ_LENGTH / statistics.median(values)
        print(f"{name:<28}{speed:>12.3g}{ratio(values, seconds[LOADER]):>11.2f}x")
    print(f"\n{'start-up':<28}{'ms':>12}{'loader takes':>15}")
    for name, values in started.items():
        print(f"{name:<28}{1e3 * statistics.median(values):>12.2f}{ratio(started[LOADER], values):>14.3f}x")
    record = {
        "tokens_per_second_ratio_to_gpt_dataset": round(ratio(seconds[CORE], seconds[LOADER]), 3),
        "tokens_per_second_ratio_to_memmap": round(ratio(seconds[MAP], seconds[LOADER]), 3),
        "tokens_per_second_ratio_mixture_to_one_corpus": round(ratio(seconds[LOADER], seconds[MIXTURE]), 3),
        **(
            {"tokens_per_second_ratio_to_dali": round(ratio(seconds[DALI], seconds[LOADER]), 3)}
            if DALI in seconds
            else {}
        ),
        "startup_ratio_to_gpt_dataset": round(ratio(started[LOADER], started[f"{CORE}, new run"]), 4),
        "startup_ratio_to_gpt_dataset_cached": round(ratio(started[LOADER], started[f"{CORE}, cached"]), 4),
        "startup_ratio_to_memmap": round(ratio(started[LOADER], started[MAP]), 3),
    }
    print(json.dumps(record))


def write(directory: Path, num_tokens: int) -> None:
    """The same documents as two of our corpora (all, and a half), as core's .bin and .idx, and as bare tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    state = np.random.default_rng(0)
    core = IndexedDatasetBuilder(str(directory / "core.bin"), dtype=np.uint16)
    paths = [directory / "ours", directory / "half"]
    for path in paths:
        path.mkdir()
    facts = {"vocab_size": VOCAB, "eod_id": EOD, "tokenizer_hash": "bench"}
    with ShardWriter(paths[0], **facts) as ours, ShardWriter(paths[1], **facts) as half:
        for number in range(num_tokens // DOCUMENT_TOKENS):
            document = state.integers(FIRST_ID, VOCAB, DOCUMENT_TOKENS - 1)
            ours.add_document(document)
            if number % 2:
                half.add_document(document)
            core.add_document(torch.from_numpy(np.append(document, EOD)), [DOCUMENT_TOKENS])
    core.finalize(str(directory / "core.idx"))
    corpus = Corpus.open(paths[0])
    corpus.tokens(0, corpus.num_tokens).tofile(directory / "tokens.bin")


def by_loader(
    directory: Path, names: tuple[str, ...] = ("ours",), made: Callable[..., TrainLoader] = TrainLoader
) -> Iterator[Batch]:
    """Micro-batches of one of our corpora, or of a mixture of several in equal shares."""
    corpora = {name: Corpus.open(directory / name) for name in names}
    sources = tuple(
        Source(name, SampleOrder(corpus.num_samples(SEQ_LENGTH), SEED, corpus.digest, SEQ_LENGTH))
        for name, corpus in corpora.items()
    )
    phase = Phase(0, tuple((name, 1) for name in sorted(names)))
    loader = made(
        corpora,
        config=DataConfig(),
        seq_length=SEQ_LENGTH,
        micro_batch_size=BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    cursor = Cursor.start(MixtureOrder(sources, (phase,)), "bench")
    return loader.micro_batches(cursor, STEPS * BATCH)


def by_core(directory: Path, cache: str = "cache") -> Iterator[Any]:
    """Micro-batches as core's ``GPTDataset`` serves them, for one epoch."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(directory / "core")
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(directory / cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(vocab_size=VOCAB, eod=EOD, pad=1, unique_identifiers={"name": "bench"}),
    )
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    samples = (len(indexed) * DOCUMENT_TOKENS - 1) // SEQ_LENGTH
    dataset = GPTDataset(indexed, prefix, documents, samples, Split.train, config)
    starts = range(0, STEPS * BATCH, BATCH)
    return (default_collate([dataset[start + row] for row in range(BATCH)]) for start in starts)


def by_memory_map(directory: Path) -> Iterator[Any]:
    """Random rows of the bare tokens."""
    mapped = np.memmap(directory / "tokens.bin", dtype=np.uint16, mode="r")
    state = np.random.default_rng(0)
    for _ in range(STEPS):
        starts = state.integers(0, len(mapped) - SEQ_LENGTH - 1, BATCH)
        rows = torch.from_numpy(np.stack([mapped[at : at + SEQ_LENGTH + 1] for at in starts]).astype(np.int64))
        yield rows[:, :-1], rows[:, 1:]


READERS: dict[str, Callable[[Path], Reader]] = {
    LOADER: lambda directory: lambda: by_loader(directory),
    MIXTURE: lambda directory: lambda: by_loader(directory, ("ours", "half")),
    CORE: lambda directory: lambda: by_core(directory),
    MAP: lambda directory: lambda: by_memory_map(directory),
    DALI: lambda directory: lambda: by_loader(directory, made=partial(DaliLoader, device_id=None)),
}


def alternate(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Seconds for all micro-batches after the first, which opens the files; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for round_number in range(rounds + 1):
        for name, reader in readers.items():
            batches = reader()
            next(batches)
            begun = time.perf_counter()
            count = sum(1 for _ in batches)
            elapsed = time.perf_counter() - begun
            assert count == STEPS - 1, f"{name} gave {count} micro-batches"
            if round_number:
                seconds[name].append(elapsed)
    return seconds


def startup(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from nothing open to the first micro-batch."""
    seconds: dict[str, list[float]] = {name: [] for name in (LOADER, f"{CORE}, new run", f"{CORE}, cached", MAP)}
    for _ in range(rounds):
        for name, values in seconds.items():
            if name.endswith("new run"):
                shutil.rmtree(directory / "first", ignore_errors=True)
            begun = time.perf_counter()
            if name.startswith(CORE):
                next(by_core(directory, "first"))
            else:
                next(READERS[name](directory)())
            values.append(time.perf_counter() - begun)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of one reader's seconds by another's of the same round."""
    return statistics.median(one / other for one, other in zip(numerator, denominator, strict=True))


if __name__ == "__main__":
    main()
