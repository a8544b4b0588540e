"""``train --memory-ledger``: an early step is measured beside its prediction; no memory left is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import RankFailure
from tests.runs import corpus, losses, train


def test_a_run_measures_and_compares(tmp_path: Path) -> None:
    directory = tmp_path / "watched"
    overrides = (
        "parallel.pipeline_model_parallel_size=2", "train.train_iters=4", "log.memory_ledger=true",
        "train.micro_batch_size=2", "train.eval_iters=0",
    )  # fmt: skip
    assert train(directory, corpus(tmp_path), 2, *overrides) == 0
    written = json.loads((directory / "memory" / "comparison.json").read_text())
    assert [one["pipeline_rank"] for one in written] == [0, 1]
    for one in written:
        rows = {(row["kind"], row["layer"]): (row["predicted_bytes"], row["measured_bytes"]) for row in one["rows"]}
        held = {key: pair for key, pair in rows.items() if key[0] in ("parameters", "gradients", "moments")}
        assert len({kind for kind, _ in held}) == 3
        assert all(predicted == measured > 0 for predicted, measured in held.values()), held
        layers = {key: pair for key, pair in rows.items() if key[0] == "activations" and key[1].startswith("layer_")}
        assert layers and all(predicted == measured for predicted, measured in layers.values()), layers
    assert "memory: total" in (directory / "log.txt").read_text()
    assert "exact" in (directory / "memory" / "comparison.txt").read_text()
    assert train(tmp_path / "unwatched", corpus(tmp_path), 2, *overrides, "log.memory_ledger=false") == 0
    assert losses(tmp_path / "unwatched") == losses(directory), "measuring a step changes nothing in it"


def test_out_of_memory_is_explained_and_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "too_large"
    overrides = ("train.train_iters=3", "log.memory_ledger=true", "train.eval_iters=0", "train.micro_batch_size=4")
    with pytest.raises(RankFailure, match="planted: too large"):
        train(directory, corpus(tmp_path), 1, *overrides, plant=plant_out_of_memory)
    text = (directory / "memory" / "out_of_memory_rank_0.txt").read_text()
    assert "planted: too large" in text and "worst moment" in text
    assert "half the micro-batch" in text and "train.micro_batch_size=2" in text


def plant_out_of_memory() -> None:
    """The second update needs more memory than there is."""
    from megatron_slm.train import step

    update, calls = step.apply_update, []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("planted: too large")
        update(*arguments)  # type: ignore[arg-type]

    step.apply_update = failing
