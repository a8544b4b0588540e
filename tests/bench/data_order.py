"""What a changed target length does to the order of the data, beside megatron-core's own index; and the loader's speed.

    python tests/bench/data_order.py [--quick]

The case: 1,000 documents of exactly one sample. A run planned for 950 samples is stopped at 900, saved, and resumed
with a target of 1,050. The order is kept when the first 900 positions of the longer plan are those already read, and a
sample among the next 100 is repeated when it was trained on before the stop. Documents are recognised by the tokens
that come out of the loader, and out of core's ``GPTDataset``, not by anybody's bookkeeping. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from megatron_slm.data.config import DataConfig
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.resume import check_resume
from megatron_slm.data.shards import ShardWriter

DOCUMENTS, SEQ_LENGTH, SEED = 1000, 8, 1234
PLANNED, STOPPED, EXTENDED, NEXT = 950, 900, 1050, 100
EOD, FIRST_ID = 2, 3


def main() -> None:
    """Print the table of the order, the table of the speed, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller corpus and fewer repetitions, within a minute")
    quick: bool = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as directory:
        ours, core = order_of_ours(Path(directory, "ours")), order_of_core(Path(directory, "core"))
        speed = loader_speed(
            Path(directory, "speed"), num_tokens=1 << 22 if quick else 1 << 26, rounds=15 if quick else 45
        )
    results = {"megatron-slm": compare(*ours), "megatron-core": compare(*core)}
    print(f"stopped at {STOPPED} of {PLANNED}, resumed with a target of {EXTENDED}; {DOCUMENTS} one-sample documents")
    print(f"{'order of':<16}{'kept of ' + str(STOPPED):>16}{'repeated of next ' + str(NEXT):>24}")
    for name, (kept, repeated) in results.items():
        print(f"{name:<16}{kept:>16}{repeated:>24}")
    print(f"\n{'reader':<28}{'tokens/s':>14}")
    for name in ("memory map, random rows", "loader"):
        print(f"{name:<28}{speed[name]:>14.3g}")
    print(f"loader / memory map, median of interleaved rounds: {speed['ratio']:.2f}")
    for size in (10**3, 10**6, 10**9, 10**12):
        print(f"one sample id, {size:>16,} samples: {sample_id_microseconds(size):6.1f} us")
    record = {
        "kept_of_900": results["megatron-slm"][0],
        "repeated_of_100": results["megatron-slm"][1],
        "core_kept_of_900": results["megatron-core"][0],
        "core_repeated_of_100": results["megatron-core"][1],
        "loader_over_memory_map": round(speed["ratio"], 3),
    }
    print(json.dumps(record))


def compare(planned: list[int], extended: list[int]) -> tuple[int, int]:
    """Positions of the extended plan that hold the sample already read there, and repeats among the next."""
    kept = sum(before == after for before, after in zip(planned[:STOPPED], extended[:STOPPED], strict=True))
    repeated = len(set(planned[:STOPPED]) & set(extended[STOPPED : STOPPED + NEXT]))
    return kept, repeated


def order_of_ours(directory: Path) -> tuple[list[int], list[int]]:
    """Documents as the loader reads them: before the stop, and by position after a resume on another layout."""
    directory.mkdir()
    with ShardWriter(directory, vocab_size=DOCUMENTS + FIRST_ID, eod_id=EOD, tokenizer_hash="bench") as writer:
        for document in range(DOCUMENTS):
            writer.add_document([FIRST_ID + document] * (SEQ_LENGTH - 1))
        writer.add_document([])  # The last label of the last sample.
    corpus = Corpus.open(directory, verify="hash")
    order = MixtureOrder.of_one("one", SampleOrder(DOCUMENTS, SEED, corpus.digest, SEQ_LENGTH))
    planned = read(
        corpus, Cursor.start(order, corpus.tokenizer_hash), STOPPED, global_batch_size=50, micro_batch_size=5, ranks=2
    )
    stored = json.dumps(Cursor.start(order, corpus.tokenizer_hash).advance(STOPPED).to_dict())

    saved, corpus = Cursor.from_dict(json.loads(stored)), Corpus.open(directory)
    check_resume(saved, Cursor.start(order, corpus.tokenizer_hash))
    start = Cursor.start(saved.order, corpus.tokenizer_hash)
    before = read(corpus, start, STOPPED, global_batch_size=30, micro_batch_size=1, ranks=3)
    after = read(corpus, saved, EXTENDED, global_batch_size=30, micro_batch_size=1, ranks=3)
    return planned, before + after


def read(
    corpus: Corpus,
    cursor: Cursor,
    stop: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    ranks: int,
) -> list[int]:
    """The document of every sample from ``cursor`` to position ``stop``, in global order."""
    loaders = [
        TrainLoader(
            {"one": corpus},
            config=DataConfig(),
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]
    documents: list[int] = []
    expected = stop - cursor.consumed_samples
    while cursor.consumed_samples < stop:
        for batches in zip(*(loader.micro_batches(cursor, global_batch_size) for loader in loaders), strict=True):
            documents += [row - FIRST_ID for batch in batches for row in batch["tokens"][:, 0].tolist()]
        cursor = cursor.advance(global_batch_size)
    return documents[:expected]


def order_of_core(directory: Path) -> tuple[list[int], list[int]]:
    """Documents as megatron-core 0.16's GPTDataset serves them, planned for each of the two targets."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    directory.mkdir()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    prefix = str(directory / "documents")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for document in range(DOCUMENTS):
        builder.add_document(torch.full((SEQ_LENGTH,), FIRST_ID + document), [SEQ_LENGTH])
    builder.finalize(prefix + ".idx")
    orders = []
    for target in (PLANNED, EXTENDED):
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQ_LENGTH,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(directory / f"cache-{target}"),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            # Without the extra token, a document of S tokens is one sample.
            add_extra_token_to_sequence=False,
            tokenizer=SimpleNamespace(
                vocab_size=DOCUMENTS + FIRST_ID, eod=EOD, pad=1, unique_identifiers={"name": "bench"}
            ),
        )
        indices = np.arange(DOCUMENTS, dtype=np.int32)
        dataset = GPTDataset(IndexedDataset(prefix), prefix, indices, target, Split.train, config)
        orders.append([int(dataset[position]["tokens"][0]) - FIRST_ID for position in range(len(dataset))])
    return orders[0], orders[1]


def loader_speed(directory: Path, *, num_tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second in alternating rounds, of the loader and of a reader that only slices random rows out of a
    memory map, widens them and makes no mask, no position and no order.
    """
    directory.mkdir()
    seq_length, batch, steps = 1024, 8, 200
    state = np.random.default_rng(0)
    with ShardWriter(
        directory, vocab_size=32_000, eod_id=EOD, tokenizer_hash="bench", shard_tokens=num_tokens
    ) as writer:
        for _ in range(num_tokens >> 16):
            writer.add_document(state.integers(FIRST_ID, 32_000, (1 << 16) - 1))
    corpus = Corpus.open(directory)
    order = SampleOrder(corpus.num_samples(seq_length), SEED, corpus.digest, seq_length)
    start = Cursor.start(MixtureOrder.of_one("one", order), corpus.tokenizer_hash)
    loader = TrainLoader(
        {"one": corpus},
        config=DataConfig(),
        seq_length=seq_length,
        micro_batch_size=batch,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    raw = directory / "tokens.bin"
    corpus.tokens(0, corpus.num_tokens).tofile(raw)
    mapped = np.memmap(raw, dtype=np.uint16, mode="r")

    def by_memory_map() -> None:
        for _ in range(steps):
            starts = state.integers(0, len(mapped) - seq_length - 1, batch)
            rows = torch.from_numpy(
                np.stack([mapped[start : start + seq_length + 1] for start in starts]).astype(np.int64)
            )
            assert rows[:, :-1].shape == rows[:, 1:].shape, "tokens and labels are views"

    def by_loader() -> None:
        for _ in loader.micro_batches(start, steps * batch):
            pass

    readers = {"memory map, random rows": by_memory_map, "loader": by_loader}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for round_number in range(rounds + 1):
        for name, reader in readers.items():
            elapsed = seconds_of(reader)
            if round_number:  # The first round brings the files into the page cache.
                seconds[name].append(elapsed)
    tokens = steps * batch * seq_length
    pairs = zip(seconds["memory map, random rows"], seconds["loader"], strict=True)
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return {**speed, "ratio": statistics.median(mapped_s / loader_s for mapped_s, loader_s in pairs)}


def sample_id_microseconds(num_samples: int) -> float:
    """Time of one scalar lookup at a position far into training."""
    order = MixtureOrder.of_one("one", SampleOrder(num_samples, SEED, "bench", SEQ_LENGTH))
    positions = range(2 * num_samples, 2 * num_samples + 500)
    rounds = [seconds_of(lambda: [order.sample_id(position) for position in positions]) for _ in range(9)]
    return statistics.median(rounds) / len(positions) * 1e6


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
