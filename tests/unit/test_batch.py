"""A batch is the samples asked for, with masks and positions that follow the documents in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_slm.data.batch import build_batch, build_samples
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.shards import ShardWriter

EOD = 2


def write(directory: Path, documents: list[list[int]], shard_tokens: int = 1000) -> Corpus:
    with ShardWriter(directory, vocab_size=500, eod_id=EOD, tokenizer_hash="t", shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.add_document(document)
    return Corpus.open(directory)


def samples(corpus: Corpus, indices: list[int | None], seq_length: int) -> list[np.ndarray | None]:
    return [None if index is None else corpus.sample(index, seq_length) for index in indices]


def test_masks_and_positions_of_a_known_sample(tmp_path: Path) -> None:
    corpus = write(tmp_path, [[10, 11, 12], [], [13, 14], [15, 16, 17]])
    batch = build_samples(
        samples(corpus, [0], 9),
        seq_length=9,
        eod_id=EOD,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
    )
    assert batch["tokens"].tolist() == [[10, 11, 12, 2, 2, 13, 14, 2, 15]]
    assert batch["labels"].tolist() == [[11, 12, 2, 2, 13, 14, 2, 15, 16]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 1]]
    types = {name: tensor.dtype for name, tensor in batch.items()}
    assert types.pop("loss_mask") is torch.float32
    assert set(types.values()) == {torch.int64}


def test_without_options_documents_do_not_matter(tmp_path: Path) -> None:
    corpus = write(tmp_path, [[10, 11, 12], [], [13, 14], [15, 16, 17]])
    batch = build_samples(samples(corpus, [0, 1], 4), seq_length=4, eod_id=EOD)
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["loss_mask"].tolist() == [[1.0] * 4] * 2
    assert batch["tokens"].tolist() == [[10, 11, 12, 2], [2, 13, 14, 2]]
    # The last label of a sample is the first token of the next.
    assert batch["labels"].tolist() == [[11, 12, 2, 2], [13, 14, 2, 15]]


@pytest.mark.parametrize("shard_tokens", [7, 64, 100_000])
def test_positions_follow_the_order_across_shards(tmp_path: Path, shard_tokens: int) -> None:
    state = np.random.default_rng(1)
    corpus = write(tmp_path, [state.integers(3, 500, 40).tolist() for _ in range(30)], shard_tokens)
    stream = corpus.tokens(0, corpus.num_tokens).astype(np.int64)
    order = SampleOrder(corpus.num_samples(16), 3, corpus.digest, 16)
    positions = [0, 5, order.num_samples + 1, 2 * order.num_samples - 1]
    batch = build_batch({"one": corpus}, MixtureOrder.of_one("one", order), positions, eod_id=EOD)
    for row, position in enumerate(positions):
        start = order.sample_id(position)[1] * 16
        assert batch["tokens"][row].tolist() == stream[start : start + 16].tolist()
        assert batch["labels"][row].tolist() == stream[start + 1 : start + 17].tolist()


def test_random_samples_agree_with_a_token_by_token_reading(tmp_path: Path) -> None:
    state = np.random.default_rng(2)
    corpus = write(tmp_path, [state.integers(3, 500, size).tolist() for size in state.integers(0, 12, 100)])
    batch = build_samples(
        samples(corpus, list(range(corpus.num_samples(20))), 20),
        seq_length=20,
        eod_id=EOD,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
    )
    for row, tokens in enumerate(batch["tokens"].tolist()):
        document = position = 0
        for column, token in enumerate(tokens):
            assert batch["document_ids"][row, column] == document
            assert batch["position_ids"][row, column] == position
            assert batch["loss_mask"][row, column] == (token != EOD)
            position += 1
            if token == EOD:
                document, position = document + 1, 0


def test_a_slot_without_a_sample_is_masked_and_valid(tmp_path: Path) -> None:
    corpus = write(tmp_path, [list(range(3, 60))])
    batch = build_samples(samples(corpus, [1, None], 8), seq_length=8, eod_id=EOD, reset_attention_mask=True)
    assert batch["loss_mask"].sum(dim=1).tolist() == [8, 0]
    assert batch["tokens"][1].tolist() == [EOD] * 8
    alone = build_samples(samples(corpus, [1], 8), seq_length=8, eod_id=EOD, reset_attention_mask=True)
    assert all(torch.equal(batch[name][:1], alone[name]) for name in alone)


def test_writing_into_a_batch_touches_neither_corpus_nor_next_batch(tmp_path: Path) -> None:
    corpus = write(tmp_path, [list(range(3, 60))])
    before = corpus.tokens(0, corpus.num_tokens).copy()
    first = build_samples(samples(corpus, [0, 1], 8), seq_length=8, eod_id=EOD, reset_attention_mask=True)
    expected = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        assert tensor.is_contiguous()
        tensor.fill_(7)
    assert (corpus.tokens(0, corpus.num_tokens) == before).all()
    again = build_samples(samples(corpus, [0, 1], 8), seq_length=8, eod_id=EOD, reset_attention_mask=True)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_window_begins_as_a_document_does(tmp_path: Path) -> None:
    corpus = write(tmp_path, [[10, 11, 12], [], [13, 14], [15, 16, 17]])
    batch = build_samples(
        samples(corpus, [0, 0, 0], 8),
        seq_length=8,
        eod_id=EOD,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
        windows=[2, 4, 8],
    )
    assert batch["tokens"][0].tolist() == [10, 11, 12, 2, 2, 13, 14, 2]
    assert batch["document_ids"].tolist() == [
        [0, 0, 1, 1, 2, 3, 4, 4],
        [0, 0, 0, 0, 1, 2, 2, 2],  # The window and the second document begin at the same token.
        [0, 0, 0, 0, 1, 2, 2, 2],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 0, 1, 0, 0, 0, 1],
        [0, 1, 2, 3, 0, 0, 1, 2],
        [0, 1, 2, 3, 0, 0, 1, 2],
    ]
    # What a token is asked to predict does not change, only what it sees.
    assert len({tuple(row) for row in batch["loss_mask"].tolist()}) == 1
