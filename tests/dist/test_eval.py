"""Documents scored under several layouts as on one rank, against dense logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.data.examples.document import Document
from megatron_slm.parallel.vocab_scores import Vocabulary
from tests.pool import RankPool
from tests.training import SMALL, VOCAB, Task, build, finish

TASK = Task(replace(SMALL, num_layers=2, init_method_std=0.2), packed=True)
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2 pp2 sp": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as started:
        yield started


def documents() -> list[Document]:
    """Of uneven lengths, with some tokens that do not count; one of a single token."""
    random = np.random.default_rng(0)
    found = [Document(np.array([7]), np.ones(1, np.float32))]
    for length in (2, 33, 9, 14, 5, 21, 12):
        weights = (random.uniform(size=length) < 0.7).astype(np.float32)
        found.append(Document(random.integers(4, VOCAB, length), weights))
    return found


def read(task: Task) -> tuple[list[Any], list[list[float]]]:
    """What this rank is told of the documents; on one rank also the dense log-softmax of each."""
    from megatron_slm.evaluate.confidence import ConfidentScores
    from megatron_slm.evaluate.scoring import Reader
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.rollout.score import scores

    groups, chunks, _ = build(task, ConfidentScores(Vocabulary(VOCAB)))
    length = task.model.seq_length
    forward = partial(scores, chunks, groups=groups)
    reader = Reader(forward, 1, groups, torch.device("cpu"), length, micro_batch_size=2, eod_id=3)
    found, dense = reader.read(documents()), []
    if groups.mp.size() == 1:
        model = unwrap(chunks[0])
        kept: list[torch.Tensor] = []
        model.ending = lambda hidden, weight, fields, group: (
            kept.append(hidden @ weight.t()) or hidden.new_zeros(1, 1, 1)
        )
        for one in documents()[1:]:
            row = replace_row(one, length)
            scores(chunks, [row], seq_length=length, groups=groups)
            logits = kept.pop()[: len(one.tokens) - 1, :VOCAB].double().log_softmax(-1)
            places = np.flatnonzero(one.weights[1:])
            dense.append([(float(logits[at, one.tokens[at + 1]]), float(logits[at].exp().max())) for at in places])
    finish()
    return found, dense


def replace_row(document: Document, length: int) -> dict[str, torch.Tensor]:
    from megatron_slm.data.examples.document import build_rows, row_of

    return build_rows([row_of([document])], seq_length=length, eod_id=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_is_told_the_dense_log_probabilities(pool: RankPool, layout: str) -> None:
    dense = pool.call(read, 1, TASK)[0][1]
    size, degrees = LAYOUTS[layout]
    for found, _ in pool.call(read, size, TASK.on(**degrees)):
        assert len(found[0].logprobs) == 0
        for one, expected in zip(found[1:], dense, strict=True):
            assert one.logprobs == pytest.approx([pair[0] for pair in expected], abs=1e-5)
            assert one.confidence == pytest.approx([pair[1] for pair in expected], abs=1e-5)
            best = np.isclose(np.exp(one.logprobs), one.confidence, atol=1e-5)
            assert one.correct.tolist() == best.astype(float).tolist()


def slots_of_rows(task: Task) -> list[int]:
    """How long rows are for a model that could read 4,096 tokens."""
    from megatron_slm.evaluate.scoring import Reader

    groups, _, _ = build(task)
    seen: list[int] = []

    def forward(batches: list[dict[str, torch.Tensor]], *, seq_length: int) -> list[torch.Tensor]:
        assert all(batch["tokens"].shape[1] == seq_length for batch in batches)
        seen.append(seq_length)
        return [torch.zeros(4, *batch["tokens"].shape) for batch in batches]

    reader = Reader(forward, 1, groups, torch.device("cpu"), 4096, micro_batch_size=2, eod_id=3)
    reader.read(documents())
    reader.read([*documents(), Document(np.full(700, 7), np.ones(700, np.float32))])
    finish()
    return seen


def test_rows_are_as_long_as_the_documents_need(pool: RankPool) -> None:
    assert pool.call(slots_of_rows, 1, TASK)[0] == [512, 768]
