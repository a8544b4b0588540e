"""Replayed samples are those an earlier run has trained on, and no others."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.replay import ReplayedSamples
from megatron_slm.data.shards import ShardWriter

LENGTH = 8


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    found = {}
    for number, name in enumerate(("books", "code")):
        directory = tmp_path_factory.mktemp(name)
        with ShardWriter(directory, vocab_size=5000, eod_id=2, tokenizer_hash="t") as writer:
            writer.add_document(np.arange(300) + 10 + 1000 * number)
        found[name] = Corpus.open(directory)
    return found


def cursor_of(corpora: dict[str, Corpus]) -> Cursor:
    sources = tuple(
        Source(name, SampleOrder(corpus.num_samples(LENGTH), 1, corpus.digest, LENGTH))
        for name, corpus in corpora.items()
    )
    return Cursor.start(MixtureOrder(sources, (Phase.of(0, {"books": Fraction(2), "code": Fraction(1)}),)), "t")


def test_every_trained_sample_comes_once_an_epoch_and_skipped_ones_never(corpora: dict[str, Corpus]) -> None:
    cursor = cursor_of(corpora).skip(2).advance(10).skip(5).advance(20).skip(1)
    replayed = ReplayedSamples(corpora, cursor)
    positions = [*range(2, 12), *range(17, 37)]
    assert replayed.num_samples == len(positions) == 30
    assert [replayed.position(index) for index in range(30)] == positions

    def first_token(position: int) -> int:
        found = cursor.order.sample_id(position)
        return int(corpora[found.source].sample(found.index, LENGTH)[0])

    order = replayed.order(seed=9)
    for epoch in range(2):
        read = [order.sample_id(30 * epoch + place)[1] for place in range(30)]
        assert Counter(int(replayed.sample(index, LENGTH)[0]) for index in read) == Counter(map(first_token, positions))
    assert replayed.sample(3, LENGTH).shape == (LENGTH + 1,) and replayed.eod_id == 2


def test_the_digest_is_of_what_was_trained_on(corpora: dict[str, Corpus]) -> None:
    start = cursor_of(corpora)
    same = ReplayedSamples(corpora, start.advance(10).advance(10)).digest
    assert ReplayedSamples(corpora, start.advance(20)).digest == same
    assert ReplayedSamples(corpora, start.advance(21)).digest != same
    assert ReplayedSamples(corpora, start.skip(1).advance(20)).digest != same


def test_a_replayed_run_may_have_replayed_another(corpora: dict[str, Corpus]) -> None:
    first = ReplayedSamples(corpora, cursor_of(corpora).advance(6))
    sources = (
        Source("books", SampleOrder(corpora["books"].num_samples(LENGTH), 1, corpora["books"].digest, LENGTH)),
        Source("replay", first.order(1)),
    )
    second = Cursor.start(MixtureOrder(sources, (Phase.of(0, {"books": Fraction(1), "replay": Fraction(1)}),)), "t")
    third = ReplayedSamples({"books": corpora["books"], "replay": first}, second.advance(12))
    trained = Counter(
        tuple(corpora[found.source].sample(found.index, LENGTH).tolist())
        for found in map(first.cursor.order.sample_id, range(6))
    )
    found = Counter(tuple(third.sample(index, LENGTH).tolist()) for index in range(12))
    assert all(found[sample] >= count for sample, count in trained.items())
