"""Why the optimizer in a checkpoint is ours: what core 0.16.1 would store of a distributed one is shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.dist.test_reshard import EXPERTS, core_shards, degrees
from tests.ranks import run_ranks

ODD = "model.moe_ffn_hidden_size=10"
"""An expert's second matrix has 320 elements then: with a bucket of its own, that is padded to 384."""

EXPERT = "decoder.layers.mlp.experts.experts.linear_fc2.weight"


def leaves(value: Any) -> list[Any]:
    """Sharded tensors anywhere in a state; a factory is asked for its parts."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, ShardedTensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [leaf for part in inner for leaf in leaves(part)]


def differing(overrides: list[str]) -> tuple[int, set[str]]:
    """Moments that core would store otherwise than they are: how many were compared, and the names that differ."""
    from megatron_slm import run
    from megatron_slm.config.load import load
    from megatron_slm.train.checkpoint import sharded_models
    from megatron_slm.train.optimizer_shards import optimizer_shards

    with run.assembled(load(None, overrides), runs.rank_environment(), fresh=False) as parts:
        state = parts.state
        models = sharded_models(state.chunks)
        ours = leaves(optimizer_shards(state.optimizer, state.chunks, models))
        known = {(s.key, s.global_offset): s.data for s in ours if not s.data.is_meta}
        core = leaves(core_shards(state.optimizer, state.chunks, models))
        compared = [(s, known[s.key, s.global_offset]) for s in core if (s.key, s.global_offset) in known]
        return len(compared), {s.key for s, right in compared if not torch.equal(s.data, right)}


@pytest.mark.parametrize("bucket", [500, "null"])
def test_core_shifts_what_lies_behind_a_padded_bucket(tmp_path: Path, bucket: object) -> None:
    """Of experts too; in one bucket nothing is behind. Should core mend it, this test says so."""
    data = runs.corpus(tmp_path)
    options = (*EXPERTS, ODD, "train.train_iters=1", *degrees(ep=2, bucket=bucket))
    assert runs.train(tmp_path / "run", data, 4, *options) == 0
    results = run_ranks(differing, 4, runs.given(tmp_path / "run", data, *options))
    assert sum(compared for compared, _ in results) > 50
    wrong = {name for _, names in results for name in names}
    shifted = ("optimizer.state.exp_avg.embedding.word_embeddings.weight", f"optimizer.state.param.{EXPERT}")
    assert {*shifted} <= wrong if bucket == 500 else not wrong
