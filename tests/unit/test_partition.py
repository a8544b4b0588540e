"""The cuts of a layout: together the tensor, each written by a rank that holds it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from megatron_slm.parallel.layout import Layout, split_layers
from megatron_slm.parallel.partition import Partition

LAYERS, EXPERTS = 4, 4
SHAPES = {
    "embedding.word_embeddings.weight": (64, 8),
    "output_layer.weight": (64, 8),
    "decoder.final_layernorm.weight": (8,),
    "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, 24, 8),
    "decoder.layers.self_attention.linear_qkv.bias": (LAYERS, 24),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, 8),
    "decoder.layers.self_attention.linear_proj.weight": (LAYERS, 8, 8),
    "decoder.layers.self_attention.linear_proj.bias": (LAYERS, 8),
    "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 32, 8),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (LAYERS, EXPERTS, 32, 8),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (LAYERS, EXPERTS, 8, 16),
    "decoder.layers.3.mlp.experts.experts.linear_fc2.weight": (EXPERTS, 8, 16),
    "decoder.layers.mlp.router.weight": (LAYERS, EXPERTS, 8),
    "mtp.layers.0.eh_proj.weight": (8, 16),
}
LAYOUTS = {
    "one": Layout(1),
    "tp2-pp2": Layout(8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "pp2-vpp2": Layout(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "ep2-etp1": Layout(4, tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    "ep4-pp2-cp2": Layout(16, pipeline_model_parallel_size=2, context_parallel_size=2, expert_model_parallel_size=4),
}


def partition(layout: Layout, *, gated: bool = True) -> Partition:
    split = split_layers(LAYERS, layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size)
    return Partition(layout, split, gated=gated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "ema.", "optimizer.state.exp_avg."])
def test_the_pieces_are_the_tensor(layout: str, prefix: str) -> None:
    for name, shape in SHAPES.items():
        covered = Counter(
            element
            for _, offsets, sizes in partition(LAYOUTS[layout]).pieces(prefix + name, shape)
            for element in itertools.product(
                *(range(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            )
        )
        assert set(covered.values()) == {1}, name
        assert len(covered) == len(list(itertools.product(*map(range, shape)))), name


def test_matrices_are_cut_as_tensor_parallel_ranks_hold_them() -> None:
    cut = partition(Layout(2, tensor_model_parallel_size=2))
    row = [(p.rank, p.offsets, p.sizes) for p in cut.pieces("decoder.layers.mlp.linear_fc2.weight", (1, 8, 16))]
    assert row == [(0, (0, 0, 0), (1, 8, 8)), (1, (0, 0, 8), (1, 8, 8))]
    gated = [(p.rank, p.offsets[1]) for p in cut.pieces("decoder.layers.mlp.linear_fc1.weight", (1, 32, 8))]
    assert gated == [(0, 0), (1, 8), (0, 16), (1, 24)], "each rank holds a part of the gate and the same part of up"
    plain = partition(cut.layout, gated=False)
    assert [p.rank for p in plain.pieces("decoder.layers.mlp.linear_fc1.weight", (1, 32, 8))] == [0, 1]


def test_layers_and_experts_are_written_by_ranks_that_hold_them() -> None:
    interleaved = partition(LAYOUTS["pp2-vpp2"])
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert [p.rank for p in interleaved.pieces(norm, (LAYERS, 8))] == [0, 1, 0, 1]
    assert [interleaved.object_rank(f"decoder.layers.mlp.linear_fc1._extra_state/shard_{n}_4") for n in range(4)] == [
        0, 1, 0, 1,
    ]  # fmt: skip
    assert {p.rank for p in interleaved.pieces("output_layer.weight", (64, 8))} == {1}
    assert {p.rank for p in interleaved.pieces("embedding.word_embeddings.weight", (64, 8))} == {0}
    for name, layout in LAYOUTS.items():
        cut = partition(layout)
        for piece in cut.pieces("decoder.layers.mlp.experts.experts.linear_fc2.weight", (LAYERS, EXPERTS, 8, 16)):
            group = layout.ranks_of("ep", piece.rank)
            per_rank = EXPERTS // len(group)
            assert group.index(piece.rank) == piece.offsets[1] // per_rank, name
            assert layout.ranks_of("edp", piece.rank)[0] == piece.rank, "the first of those that hold it"


def test_what_cannot_be_cut_is_one_piece() -> None:
    cut = partition(Layout(2, tensor_model_parallel_size=2))
    assert len(list(cut.pieces("output_layer.weight", (63, 8)))) == 1
    assert [p.rank for p in cut.pieces("something.new", (3,))] == [0]
    assert [(p.offsets, p.sizes) for p in cut.pieces("ema.scalar", ())] == [((), ())]
