"""Whatever the ranks and micro-batches, a step reads the same samples, and a validation its samples exactly once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_slm.data.batch import Batch, build_batch
from megatron_slm.data.config import DataConfig
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader, ValidLoader, positions_of
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.shards import ShardWriter
from megatron_slm.errors import ConfigError, DataError

EOD, SEQ_LENGTH = 2, 8
SPLITS = [(m, d) for m in (1, 2, 3, 4, 6, 12) for d in (1, 2, 3, 4, 6, 12) if 12 % (m * d) == 0]


def written(directory: Path, seed: int) -> Corpus:
    state = np.random.default_rng(seed)
    with ShardWriter(directory, vocab_size=500, eod_id=EOD, tokenizer_hash="t", shard_tokens=90) as writer:
        for size in state.integers(1, 30, 20):
            writer.add_document(state.integers(3, 500, size))
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return written(tmp_path_factory.mktemp("corpus"), 0)


@pytest.fixture(scope="module")
def corpora(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return {"one": corpus, "two": written(tmp_path_factory.mktemp("two"), 1)}


def order_of(corpus: Corpus) -> MixtureOrder:
    return MixtureOrder.of_one("one", SampleOrder(corpus.num_samples(SEQ_LENGTH), 1, corpus.digest, SEQ_LENGTH))


def mixture_of(corpora: dict[str, Corpus]) -> MixtureOrder:
    """Two phases; the second begins at sample 7, inside a step."""
    sources = tuple(
        Source(name, SampleOrder(corpus.num_samples(SEQ_LENGTH), 1, corpus.digest, SEQ_LENGTH))
        for name, corpus in corpora.items()
    )
    weights = {"one": Fraction(7), "two": Fraction(3)}
    return MixtureOrder(sources, (Phase.of(0, weights), Phase.of(7, {**weights, "one": Fraction(1)})))


def cursor_at(order: MixtureOrder, position: int) -> Cursor:
    return Cursor.start(order, "t").skip(position)


def train_loader(corpus: Corpus, micro: int, rank: int, size: int) -> TrainLoader:
    return TrainLoader(
        {"one": corpus},
        config=DataConfig(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True),
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )


def valid_loader(corpus: Corpus, micro: int, rank: int, size: int, seq_length: int = SEQ_LENGTH) -> ValidLoader:
    return ValidLoader(
        corpus,
        config=DataConfig(),
        seq_length=seq_length,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )


@pytest.mark.parametrize("consumed", [0, 12, 900])
@pytest.mark.parametrize(("micro", "size"), SPLITS)
def test_positions_of_all_ranks_are_the_global_batch(consumed: int, micro: int, size: int) -> None:
    positions = [
        position
        for k in range(12 // (micro * size))
        for rank in range(size)
        for position in positions_of(
            k,
            consumed_samples=consumed,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
    ]
    assert positions == list(range(consumed, consumed + 12))


@pytest.mark.parametrize(("micro", "size"), SPLITS)
def test_tensors_of_all_ranks_are_the_global_batch(corpus: Corpus, micro: int, size: int) -> None:
    consumed = corpus.num_samples(SEQ_LENGTH) - 5  # The step crosses an epoch.
    whole = build_batch(
        {"one": corpus},
        order_of(corpus),
        range(consumed, consumed + 12),
        eod_id=EOD,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
    )
    cursor = cursor_at(order_of(corpus), consumed)
    ranks = [list(train_loader(corpus, micro, rank, size).micro_batches(cursor, 12)) for rank in range(size)]
    dealt = [ranks[rank][k] for k in range(len(ranks[0])) for rank in range(size)]
    for name, expected in whole.items():
        assert torch.equal(torch.cat([batch[name] for batch in dealt]), expected), name


@pytest.mark.parametrize("consumed", [0, 1, 30])
@pytest.mark.parametrize(("micro", "size"), SPLITS)
def test_a_mixture_with_windows_is_dealt_alike_to_all_ranks(
    corpora: dict[str, Corpus], micro: int, size: int, consumed: int
) -> None:
    """Phase and window change inside the step; rows are those of a loader that reads one sample at a time."""
    config = DataConfig(
        reset_attention_mask=True, reset_position_ids=True, length_schedule=("0: 2", "5: 4", f"33: {SEQ_LENGTH}")
    )
    cursor = cursor_at(mixture_of(corpora), consumed)

    def read(micro: int, rank: int, size: int, cursor: Cursor, samples: int) -> list[Batch]:
        loader = TrainLoader(
            corpora,
            config=config,
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        return list(loader.micro_batches(cursor, samples))

    ranks = [read(micro, rank, size, cursor, 12) for rank in range(size)]
    dealt = [ranks[rank][k] for k in range(len(ranks[0])) for rank in range(size)]
    single = [read(1, 0, 1, cursor.advance(offset), 1)[0] for offset in range(12)]
    for name in single[0]:
        assert torch.equal(torch.cat([batch[name] for batch in dealt]), torch.cat([one[name] for one in single])), name
    for offset, batch in enumerate(single):
        found = cursor.order.sample_id(consumed + offset)
        assert batch["tokens"][0].tolist() == corpora[found.source].sample(found.index, SEQ_LENGTH)[:-1].tolist()
        window = 2 if consumed + offset < 5 else 4 if consumed + offset < 33 else SEQ_LENGTH
        assert batch["position_ids"].max() < window
    assert {cursor.order.sample_id(consumed + offset).source for offset in range(12)} == {"one", "two"}


def test_options_of_the_configuration_reach_the_batch(corpus: Corpus) -> None:
    plain = TrainLoader(
        {"one": corpus},
        config=DataConfig(),
        seq_length=SEQ_LENGTH,
        micro_batch_size=12,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    batch = next(plain.micro_batches(cursor_at(order_of(corpus), 0), 12))
    assert "document_ids" not in batch and batch["loss_mask"].min() == 1
    assert batch["position_ids"].tolist() == [list(range(SEQ_LENGTH))] * 12


def test_a_global_batch_that_does_not_divide_is_refused_before_reading(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 10 is not a multiple of train.micro_batch_size 2 x 3"):
        train_loader(corpus, 2, 0, 3).micro_batches(cursor_at(order_of(corpus), 0), 10)
    with pytest.raises(ConfigError, match="global_batch_size 2"):
        valid_loader(corpus, 2, 0, 3).steps(1, 2)


def rows_used(steps: list[list[list[Batch]]]) -> list[list[int]]:
    """Tokens of every slot that counts, in global order; ``steps`` [rank][step][micro-batch]."""
    rows = []
    for step in range(len(steps[0])):
        for k in range(len(steps[0][step])):
            for rank in steps:
                batch = rank[step][k]
                counts = batch["loss_mask"].sum(dim=1)
                assert set(counts.tolist()) <= {0, SEQ_LENGTH}, "a sample is used whole or not at all"
                rows += batch["tokens"][counts > 0].tolist()
    return rows


@pytest.mark.parametrize(
    ("micro", "size", "multiple"), [(m, d, p) for m, d in SPLITS for p in (1, 2) if 12 // (m * d) % p == 0]
)
@pytest.mark.parametrize("eval_iters", [1, 2, 100])
def test_validation_uses_its_samples_exactly_once(
    corpus: Corpus, micro: int, size: int, eval_iters: int, multiple: int
) -> None:
    available = corpus.num_samples(SEQ_LENGTH)
    wanted = min(available, 12 * eval_iters)
    assert available % 12, "the last step of the longest case is not full"
    steps = [
        list(valid_loader(corpus, micro, rank, size).steps(eval_iters, 12, multiple=multiple)) for rank in range(size)
    ]
    shapes = [[len(step) for step in rank] for rank in steps]
    assert all(shape == shapes[0] for shape in shapes), "ranks would wait for each other for ever"
    assert all(count % multiple == 0 and 0 < count <= 12 // (micro * size) for count in shapes[0])
    expected = corpus.tokens(0, wanted * SEQ_LENGTH).reshape(wanted, SEQ_LENGTH)
    assert rows_used(steps) == expected.tolist()


def test_validation_of_a_split_smaller_than_a_batch_wastes_little(corpus: Corpus) -> None:
    steps = list(valid_loader(corpus, 1, 0, 2, seq_length=64).steps(8, 1000))
    samples = corpus.num_samples(64)
    assert 0 < samples < 10
    assert [len(step) for step in steps] == [-(-samples // 2)]


def test_validation_without_a_sample_is_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="too few for one sample of seq_length 4096"):
        valid_loader(corpus, 1, 0, 1, seq_length=4096).steps(1, 1)
