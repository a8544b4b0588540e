"""Context parallelism: ranks that share each sequence compute what one rank computes, in float64 within 1e-9."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests import runs
from tests.breadth import widely
from tests.dist.test_equivalence import check_equal, one_rank, outcome
from tests.dist.test_resume import check_bitwise
from tests.ranks import run_ranks
from tests.training import SMALL, Task

CP2_RUN = "parallel.context_parallel_size=2"
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
GATHERED = {"cp_comm_type": "all_gather"}

LLAMA = Task(model=replace(SMALL, num_layers=2), iters=3)
GPT2 = Task(
    model=ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=12,
        seq_length=32,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        swiglu=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
    ),
    iters=3,
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, CP2),
    "cp4": (4, CP4),
    "cp2-tp2-sp": (4, CP2 | TP2_SP),
    "cp2-pp2": (4, CP2 | PP2),
    "cp2-dp2": (4, CP2),
}


@pytest.mark.parametrize("exchange", widely(["p2p", "all_gather"], "p2p"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_rank(layout: str, exchange: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    check_equal(LLAMA.on(**degrees, cp_comm_type=exchange), world_size, 1e-9)


@pytest.mark.parametrize(("layout", "exchange"), [("cp4", {}), ("cp2-pp2", GATHERED)])
def test_packed_documents_equal_one_rank(layout: str, exchange: dict[str, Any]) -> None:
    world_size, degrees = LAYOUTS[layout]
    task = replace(LLAMA, packed=True, train=TrainConfig(micro_batch_size=2, global_batch_size=4))
    check_equal(task.on(**degrees, **exchange), world_size, 1e-9)
    assert one_rank(task).losses != one_rank(LLAMA).losses, "the documents changed nothing, so nothing was compared"


def test_learned_positions_and_tied_embeddings_equal_one_rank() -> None:
    check_equal(GPT2.on(**CP2, **PP2), 4, 1e-9)


RECOMPUTE = {
    "selective": (TP2_SP, TrainConfig(global_batch_size=4, recompute_granularity="selective")),
    "full": (
        PP2 | GATHERED,
        TrainConfig(
            global_batch_size=4, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        ),
    ),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_nothing(recompute: str) -> None:
    """Keys are exchanged once more in the backward pass, by all ranks in the same order."""
    degrees, train = RECOMPUTE[recompute]
    found, expected = outcome(replace(LLAMA, train=train).on(**CP2, **degrees), 4), one_rank(LLAMA)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)


@pytest.mark.parametrize("exchange", ["p2p", "all_gather"])
def test_bf16_trains_like_one_rank(exchange: str) -> None:
    task = replace(LLAMA, precision=PrecisionConfig(bf16=True))
    found, expected = outcome(task.on(**CP2, cp_comm_type=exchange), 2), one_rank(task)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3, abs=0)


def built(overrides: list[str]) -> tuple[int, float, str]:
    """(cp rank, what dropout would draw next where tp ranks agree, exchange of the attention) of this rank of a run."""
    from megatron_slm import run_model
    from megatron_slm.config.load import load
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.parallel.groups import build_groups

    config = load(None, overrides).config
    groups = build_groups(config.parallel)
    model = unwrap(run_model.build_model(config, groups, torch.device("cpu"), 512).chunks[0])
    draw = float(torch.rand(1))
    return groups.cp.rank(), draw, type(model.decoder.layers[0].self_attention.core_attention.over).__name__


def test_ranks_with_other_tokens_draw_other_dropout_masks() -> None:
    options = (CP2_RUN, "parallel.tensor_model_parallel_size=2", "parallel.cp_comm_type=all_gather")
    found = run_ranks(built, 4, [*runs.TINY, *options])
    assert {used for _, _, used in found} == {"Gathered"}, "the option decides how keys are exchanged"
    by_cp = {cp: {draw for other, draw, _ in found if other == cp} for cp in (0, 1)}
    assert all(len(same) == 1 for same in by_cp.values()), "tp ranks share the default stream"
    assert by_cp[0] != by_cp[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


OF_THE_MACHINE = ("_ms", "_per_second", "_bits", "_bytes", "mfu", "goodput")


def test_resume_is_bitwise(tmp_path: Path, data: Path) -> None:
    """Dropout makes the random states matter."""
    check_bitwise(tmp_path, data, 2, CP2_RUN, "model.hidden_dropout=0.1", "train.ema_decay=0.9")


def test_a_run_begun_on_two_ranks_and_ended_on_one_equals_one_rank(tmp_path: Path, data: Path) -> None:
    """Losses, validation, averages, layer norms and noise scale are those of whole sequences."""
    measured = ("train.ema_decay=0.9", "log.layer_norms_interval=2", "log.noise_scale_interval=2")
    options = ("train.train_iters=4", "train.eval_interval=2", "data.reset_attention_mask=true", *measured)
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert runs.train(alone, data, 1, *options) == 0
    assert (
        runs.train(both, data, 2, *options, CP2_RUN, "parallel.cp_comm_type=all_gather", "train.exit_interval=2") == 75
    )
    assert runs.train(both, data, 1, *options) == 0
    for name in ("metrics.jsonl", "validation.jsonl", "dynamics.jsonl"):
        found, expected = (dict(numbers(runs.records(run, name))) for run in (both, alone))
        assert found == pytest.approx(expected, rel=2e-4), name


def numbers(record: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of some records by its path, but for those of the machine."""
    if isinstance(record, dict | list):
        for key, value in record.items() if isinstance(record, dict) else enumerate(record):
            yield from numbers(value, f"{name}.{key}")
    elif isinstance(record, float | int) and not name.endswith(OF_THE_MACHINE):
        yield name, record
