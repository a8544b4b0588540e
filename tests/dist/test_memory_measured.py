"""What the dry world predicts is what real ranks over gloo measure: held bytes and activations to the byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.bench.memory_cpu import CASES, Judged, case_config, judged
from tests.pool import RankPool

RANKS = 4
FEW = ("pp2 vpp2 dp2", "tp2 ep2 dp2 experts recompute all")
"""Of the benchmark's cases: between them every kind of block, and each of gloo's temporaries."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(RANKS) as ranks:
        yield ranks


@pytest.mark.parametrize("name", FEW)
def test_prediction_is_what_ranks_measure(name: str, pool: RankPool) -> None:
    for rank in judged(case_config(CASES[name]), pool):
        assert rank.static_differs == []
        assert rank.saved_differs == []
        assert abs(rank.peak_pct) <= 2.0, f"rank {rank.rank}: {rank.peak_pct:+.2f} % from torch's profiler"


def test_a_wrong_prediction_is_seen(pool: RankPool) -> None:
    """The same ranks against the prediction of another micro-batch size."""
    config = case_config(CASES["dp4"])
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=1))
    found: Judged = judged(config, pool, predicted_for=other)[0]
    assert found.static_differs == [] and found.saved_differs and abs(found.peak_pct) > 2.0
