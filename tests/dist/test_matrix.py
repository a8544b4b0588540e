"""Every pair of parallel axes, kinds of model and schedules that can stand together computes what one rank computes.

The cases are a pairwise covering array of ``tests.axes.SPACE`` (every second of them, unless everything is run), each
on four ranks of one pool, in float64: losses of
every step, every gradient, the gradient norm and the weights afterwards. What ``config.rules`` refuse is left out;
``tests/unit/test_covering.py`` lists it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from megatron_slm.config.run_config import RunConfig
from tests.axes import AXES, RANKS, SPACE, config_of, one_rank
from tests.breadth import BREADTH
from tests.covering import Case, covering
from tests.job import Outcome, train, worst_difference
from tests.pool import RankPool
from tests.ranks import RankFailure

ITERS = 2
TOLERANCE = 1e-9
"""Layouts differ by the order of float64 sums, 1e-15: this leaves room for that and for nothing else."""
NORM_TOLERANCE = 1e-6
"""Core takes the gradient norm in fp32, whatever the gradients are; what is clipped by it inherits that."""

Reference = Callable[[RunConfig], Outcome]


def name_of(case: Case) -> str:
    """What differs from the plain values."""
    return "-".join(f"{axis}_{value}" for axis, value in case if value != AXES[axis][0])


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(RANKS) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def reference(pool: RankPool) -> Reference:
    """One rank's outcome; cases that differ in their layout alone share it."""

    @functools.cache
    def run(config: RunConfig) -> Outcome:
        outcome: Outcome = pool.call(train, 1, config, ITERS)[0]
        return outcome

    return run


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name_of(case), marks=BREADTH if number % 2 else ())
        for number, case in enumerate(covering(SPACE).cases)
    ],
)
def test_equals_one_rank(case: Case, pool: RankPool, reference: Reference) -> None:
    config = config_of(case)
    expected = reference(one_rank(config))
    found: Outcome = pool.call(train, RANKS, config, ITERS)[0]
    assert expected.losses[0] != expected.losses[-1], "nothing was learned, so nothing was compared"
    assert_equal("initial", found, expected, 0.0)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE, abs=0)
    assert_equal("gradients", found, expected, TOLERANCE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=NORM_TOLERANCE, abs=0)
    clipped = 0.0 < config.optimizer.clip_grad < max(expected.grad_norms)
    assert_equal("weights", found, expected, NORM_TOLERANCE if clipped else TOLERANCE)
    assert found.replicas <= TOLERANCE, f"ranks that hold the same element differ by {found.replicas:.2e}"


def assert_equal(what: str, found: Outcome, expected: Outcome, tolerance: float) -> None:
    """Every global tensor of one kind is equal within ``tolerance`` of its norm."""
    error, name = worst_difference(getattr(found, what), getattr(expected, what))
    assert error <= tolerance, f"{what}: {name} differs by {error:.2e} of its norm"


def fail_on_the_last_rank() -> None:
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("planted in the last rank")
    dist.barrier()  # the others wait for it, as in a collective


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def test_a_rank_that_fails_is_shown_and_the_pool_begins_anew(pool: RankPool) -> None:
    assert pool.call(world_size, 2) == [2, 2]
    with pytest.raises(RankFailure, match="planted in the last rank"):
        pool.call(fail_on_the_last_rank, RANKS)
    assert pool.call(world_size, RANKS) == [RANKS] * RANKS
