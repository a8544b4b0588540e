"""The layout arithmetic against megatron-core's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.layout import Coordinates, Layout, chunk_layers, split_layers

ORDER = "tp-cp-ep-dp-pp"
DEGREES = [degrees for degrees in itertools.product((1, 2, 3, 4), repeat=4) if degrees[0] * degrees[1] <= 12]


@pytest.mark.parametrize("axis", ["tp", "cp", "dp", "pp", "dp-cp", "tp-pp", "tp-cp", "tp-dp", "tp-dp-cp"])
def test_groups_are_those_of_core(axis: str) -> None:
    for tp, cp, dp, pp in DEGREES:
        layout = Layout(tp * cp * dp * pp, tp, pp, context_parallel_size=cp)
        core = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=ORDER).get_ranks(axis)
        assert [list(group) for group in layout.groups_of(axis)] == core


@pytest.mark.parametrize("axis", ["etp", "ep", "edp", "etp-ep", "etp-ep-pp"])
def test_expert_groups_are_those_of_core(axis: str) -> None:
    """Experts have a grid of their own: their tp may be larger or smaller than that of the dense layers."""
    core_axis = axis.replace("etp", "tp").replace("edp", "dp")
    for etp, ep, edp, pp in DEGREES:
        core = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=ORDER).get_ranks(core_axis)
        for tp in {1, etp, etp * ep}:
            layout = Layout(etp * ep * edp * pp, tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
            assert [list(group) for group in layout.groups_of(axis)] == core


def test_coordinates_and_ranks_are_inverse() -> None:
    for tp, cp, dp, pp in DEGREES:
        layout = Layout(tp * cp * dp * pp, tp, pp, context_parallel_size=cp)
        positions = [layout.coordinates(rank) for rank in range(layout.world_size)]
        assert len(set(positions)) == layout.world_size
        assert [layout.rank_at(position) for position in positions] == list(range(layout.world_size))


def test_a_group_holds_its_rank_and_varies_one_axis() -> None:
    layout = Layout(48, 2, 3, context_parallel_size=2)
    for rank, axis in itertools.product(range(48), ("tp", "cp", "dp", "pp")):
        group = layout.ranks_of(axis, rank)
        own = layout.coordinates(rank)
        assert rank in group
        for member in group:
            other = layout.coordinates(member)
            assert {name for name in ("tp", "cp", "dp", "pp") if getattr(own, name) != getattr(other, name)} <= {axis}


def test_sixteen_thousand_ranks() -> None:
    layout = Layout(16384, 8, 16, context_parallel_size=2)
    assert layout.data_parallel_size == 64
    assert layout.coordinates(16383) == Coordinates(tp=7, cp=1, dp=63, pp=15)
    assert layout.ranks_of("pp", 5) == tuple(5 + 1024 * stage for stage in range(16))
    assert len(layout.groups_of("tp")) == 2048


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"world_size": 6, "tensor_model_parallel_size": 4}, ("6", "4", "4 or 8")),
        ({"world_size": 2, "virtual_pipeline_model_parallel_size": 2}, ("virtual_pipeline_model_parallel_size 2", "1")),
        ({"world_size": 4, "expert_model_parallel_size": 3}, ("expert_model_parallel_size 3", "3 or 6")),
        (
            {"world_size": 4, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
            ("expert_tensor_parallel_size 2", "expert_model_parallel_size 4", "8"),
        ),
        ({"world_size": 0}, ("world_size is 0",)),
    ],
)
def test_impossible_degrees_are_refused_with_their_values(layout: dict[str, int], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        Layout(**layout)
    assert all(word in str(refusal.value) for word in words)


def test_unknown_rank_and_axis_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 4 does not exist: the ranks are 0 to 3"):
        Layout(4).coordinates(4)
    with pytest.raises(ConfigError, match="'vpp' is no axis"):
        Layout(4).ranks_of("tp-vpp", 0)


def test_from_config_takes_every_degree() -> None:
    section = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=2,
        context_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    assert Layout.from_config(section, 24) == Layout(24, 2, 3, 2, 2, 4, 1)


def test_microbatches() -> None:
    layout = Layout(8, 2)
    assert layout.num_microbatches(24, 3) == 2
    with pytest.raises(ConfigError, match=r"global_batch_size 20 .* 3 x data-parallel size 4 = 12.* 12 or 24"):
        layout.num_microbatches(20, 3)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_layers_are_split_as_core_does(embedding: bool, loss: bool) -> None:
    accepted = 0
    for num_layers, pp, vpp in itertools.product(range(1, 13), range(1, 5), (None, 1, 2, 3)):
        if pp == 1 and vpp is not None:
            continue  # core ignores the option there, and this program refuses it
        expected = _core_split(num_layers, pp, vpp, embedding=embedding, loss=loss)
        try:
            split = split_layers(num_layers, pp, vpp, embedding_counts=embedding, loss_counts=loss)
        except ConfigError:
            assert expected is None
            continue
        accepted += 1
        layers = [[chunk_layers(split, rank, chunk) for chunk in range(len(split[0]))] for rank in range(pp)]
        assert [[(held.start, len(held)) for held in chunks] for chunks in layers] == expected
        assert sorted(layer for chunks in layers for held in chunks for layer in held) == list(range(num_layers))
    assert accepted > 20


def _core_split(
    num_layers: int, pp: int, vpp: int | None, *, embedding: bool, loss: bool
) -> list[list[tuple[int, int]]] | None:
    """Core's (first layer, number of layers) by pipeline rank and chunk; None where core refuses."""
    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            pipeline_dtype=torch.float32,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
        )
        return [
            [
                (get_transformer_layer_offset(config, chunk, rank), get_num_layers_to_build(config, chunk, rank))
                for chunk in ([None] if vpp is None else range(vpp))
            ]
            for rank in range(pp)
        ]
    except (AssertionError, ValueError):
        return None


def test_llama_405b_on_sixteen_stages() -> None:
    split = split_layers(126, 16, None, embedding_counts=True, loss_counts=True)
    assert [sum(chunks) for chunks in split] == [7, *[8] * 14, 7]


def test_an_uneven_split_names_values_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"num_layers 10 .*size 4: .*evenly.*size: 1, 2, 5\. .*num_layers: 8 or 12"):
        split_layers(10, 4, None)
    with pytest.raises(ConfigError, match=r"num_layers 2 .* more pipeline stages than layers.*num_layers: 4\."):
        split_layers(2, 4, None)
    with pytest.raises(ConfigError, match="at least 2 pipeline stages"):
        split_layers(4, 1, 2)
