"""The ranks that all other distributed tests stand on."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import RankFailure, run_ranks


def summed(tensor: torch.Tensor, scale: int) -> tuple[int, torch.Tensor]:
    rank = torch.distributed.get_rank()
    result = tensor * scale * (rank + 1)
    torch.distributed.all_reduce(result)
    return rank, result


def fails_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one's reason")
    torch.distributed.barrier()


def hangs_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(1000)


def surroundings() -> tuple[str, str, int, int]:
    return os.environ["FROM_THE_TEST"], str(Path.cwd()), torch.get_num_threads(), len(os.listdir("/proc/self/task"))


def core_is_on_cpu() -> bool:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return bool(parallel_state.get_tensor_model_parallel_world_size() == 2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_ranks(summed, world_size, torch.ones(3), 2)
    assert [rank for rank, _ in results] == list(range(world_size)), "one result a rank, in order"
    expected = 2.0 * sum(range(1, world_size + 1))
    assert all(torch.equal(tensor, torch.full((3,), expected)) for _, tensor in results), "ranks met in the all-reduce"


def test_failure_names_rank_and_traceback() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 died: ValueError: rank one's reason") as caught:
        run_ranks(fails_on_rank_1, 2)
    assert "in fails_on_rank_1" in str(caught.value), "the traceback is the rank's own"


def test_hanging_rank_shows_where() -> None:
    with pytest.raises(RankFailure, match="in hangs_on_rank_1"):
        run_ranks(hangs_on_rank_1, 2, timeout_s=3.0)


def test_ranks_have_the_tests_surroundings_and_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    for variable, directory, compute_threads, _ in run_ranks(surroundings, 2):
        assert (variable, directory, compute_threads) == ("yes", str(tmp_path), 1), "as in the test's own process"


def test_a_busy_test_process_does_not_matter() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    weight = torch.ones(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()
    try:
        assert len(run_ranks(summed, 2, torch.ones(1), 1)) == 2, "the ranks are not forked from this process"
    finally:
        stop.set()
        thread.join()


def test_core_is_ready_in_the_ranks() -> None:
    assert run_ranks(core_is_on_cpu, 2) == [True, True], "the CPU seam is applied before the ranks start"


def test_function_that_ranks_cannot_find_is_refused() -> None:
    with pytest.raises(TypeError, match="move it to the top of its module"):
        run_ranks(lambda: None, 2)
