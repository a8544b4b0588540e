"""Initial values: normal, addressed by (seed, name, global index), whatever is cut where."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_slm.parallel import device

device.preload("cpu")

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megatron_slm.model.config import ModelConfig  # noqa: E402
from megatron_slm.model.gpt import initial_deviation  # noqa: E402
from megatron_slm.parallel.initialise import normal_shard  # noqa: E402

ROWS, COLUMNS = 24, 10
FROZEN = (1.1014870098754577, -1.0873808052759948, 2.6847856533806316)


def shard(*offsets: tuple[int, int, int], shape: tuple[int, ...] = (ROWS, COLUMNS), key: str = "w") -> ShardedTensor:
    local = list(shape)
    for axis, _, parts in offsets:
        local[axis] //= parts
    return ShardedTensor.from_rank_offsets(key, torch.empty(local), *offsets, replica_id=0)


def values(*offsets: tuple[int, int, int], seed: int = 1, key: str = "w") -> torch.Tensor:
    return normal_shard(shard(*offsets, key=key), seed)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_row_shards_are_slices_of_the_whole(parts: int) -> None:
    pieces = [values((0, rank, parts)) for rank in range(parts)]
    assert torch.cat(pieces).equal(values())


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_column_shards_are_slices_of_the_whole(parts: int) -> None:
    pieces = [values((1, rank, parts)) for rank in range(parts)]
    assert torch.cat(pieces, dim=1).equal(values())


def test_more_padding_rows_leave_the_others_alone() -> None:
    longer = normal_shard(shard(shape=(ROWS + 8, COLUMNS)), 1)
    assert longer[:ROWS].equal(values())


def test_seed_name_and_layer_change_everything() -> None:
    def layer(index: int) -> torch.Tensor:
        stacked = ShardedTensor.from_rank_offsets(
            "w", torch.empty(ROWS, COLUMNS), (0, index, 4), replica_id=0, prepend_axis_num=1
        )
        return normal_shard(stacked, 1)

    streams = [values(), values(seed=2), values(key="v"), layer(0), layer(1)]
    for i, first in enumerate(streams):
        for second in streams[i + 1 :]:
            assert not torch.isclose(first, second).any()


def test_values_are_standard_normal() -> None:
    many = normal_shard(shard(shape=(1000, 400)), 3).flatten()
    count = many.numel()
    assert abs(many.mean()) < 4 / math.sqrt(count)
    assert abs(many.var() - 1) < 4 * math.sqrt(2 / count)
    for point, share in ((0.0, 0.5), (1.0, 0.841345), (2.0, 0.977250), (-3.0, 0.001350)):
        found = (many < point).double().mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / count)
    lag = (many[1:] * many[:-1]).mean()
    assert abs(lag) < 4 / math.sqrt(count)


def test_values_are_frozen() -> None:
    """A change of these numbers would change every run that starts from a seed."""
    assert values()[0, :3].tolist() == pytest.approx(FROZEN, rel=1e-12)


def test_deviation_follows_megatron_and_mup() -> None:
    plain = ModelConfig(num_layers=8, hidden_size=512, init_method_std=0.02)
    wide = ModelConfig(num_layers=8, hidden_size=512, init_method_std=0.02, mup_base_hidden_size=128)
    qkv, out = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc2.weight"
    assert initial_deviation(qkv, plain) == 0.02
    assert initial_deviation(out, plain) == pytest.approx(0.02 / 4)
    assert initial_deviation(qkv, wide) == pytest.approx(0.02 / 2)
    assert initial_deviation(out, wide) == pytest.approx(0.02 / 2 / 4)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert initial_deviation(name, wide) == 0.02
    for expert in ("experts.experts.linear_fc2.weight", "shared_experts.linear_fc2.weight"):
        assert initial_deviation(f"decoder.layers.mlp.{expert}", wide) == pytest.approx(0.02 / 2 / 4)
    # Transformer Engine's grouped experts are one parameter each, numbered behind the name.
    assert initial_deviation("decoder.layers.mlp.experts.linear_fc1.weight12", wide) == pytest.approx(0.02 / 2)
    for name in ("decoder.layers.mlp.router.weight", "decoder.layers.mlp.shared_experts.gate_weight"):
        assert initial_deviation(name, wide) == 0.02
    for name in ("decoder.final_layernorm.weight", "decoder.layers.self_attention.linear_qkv.bias"):
        assert initial_deviation(name, plain) is None
