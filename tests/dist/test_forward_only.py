"""A pipeline's pass without a backward pass leaves nothing behind that changes a later step."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from megatron_slm.parallel.config import ParallelConfig
from tests.ranks import run_ranks
from tests.training import Task, build, micro_batches

STAGES = ParallelConfig(pipeline_model_parallel_size=2, overlap_grad_reduce=True)
INTERLEAVED = replace(STAGES, virtual_pipeline_model_parallel_size=2)


class Counted(contextlib.AbstractContextManager[None]):
    """Counts who is inside; the garbage collector does not leave it for anybody."""

    def __init__(self, inside: list[int]) -> None:
        self._inside = inside

    def __enter__(self) -> None:
        self._inside[0] += 1

    def __exit__(self, *_: object) -> None:
        self._inside[0] -= 1


def left_inside(task: Task) -> tuple[int, bool]:
    """How many contexts that hold back reductions a forward pass leaves open, and whether core still knows ours."""
    from megatron.core.utils import get_model_config

    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.stages import pretrain

    groups, chunks, _ = build(task)
    config: Any = get_model_config(chunks[0])
    inside = [0]
    given = [lambda: Counted(inside) for _ in chunks]
    config.no_sync_func = given if len(chunks) > 1 else given[0]
    before = config.no_sync_func
    batches, length = micro_batches(task, 0, groups), task.model.seq_length
    run_schedule(chunks, batches, pretrain.loss, forward_only=True, seq_length=length, groups=groups)
    return inside[0], config.no_sync_func is before


@pytest.mark.parametrize("parallel", [STAGES, INTERLEAVED], ids=["1f1b", "interleaved"])
def test_a_forward_pass_holds_back_no_reductions_of_later_steps(parallel: ParallelConfig) -> None:
    assert run_ranks(left_inside, 2, Task(parallel=parallel)) == [(0, True)] * 2
