"""Bytes on every link, counted by hand; clusters and what is refused of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_slm.config.load import load
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.cluster import CLUSTERS, cluster_of
from megatron_slm.plan.links import Span, Volume, next_stage_crosses, ring_steps, span, volume
from megatron_slm.plan.predict import Question
from megatron_slm.plan.rates import PUBLISHED
from megatron_slm.plan.volumes import by_link, traffic

LAYOUT = Layout(world_size=64, tensor_model_parallel_size=4, pipeline_model_parallel_size=2, context_parallel_size=2)
"""tp 4, cp 2, dp 4, pp 2: two cp groups' worth of ranks fill a node of 8."""


@pytest.mark.parametrize(
    ("axis", "size", "in_node"),
    [("tp", 4, 4), ("cp", 2, 2), ("dp", 4, 1), ("dp-cp", 8, 2), ("pp", 2, 1), ("tp-cp", 8, 8)],
)
def test_where_the_members_of_a_group_are(axis: str, size: int, in_node: int) -> None:
    assert span(LAYOUT, axis, 0, 8) == Span(size, in_node)
    assert span(LAYOUT, axis, 37, 8) == Span(size, in_node)


def test_a_stage_sends_to_the_same_place_of_the_next_one() -> None:
    assert next_stage_crosses(LAYOUT, 0, 8)
    small = Layout(world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    assert not next_stage_crosses(small, 0, 8)
    assert next_stage_crosses(small, 6, 4), "rank 6 sends round to rank 0, in the first node of four"


@pytest.mark.parametrize(
    ("collective", "group", "sent"),
    [
        ("all_reduce", Span(4, 4), Volume(2 * 3 / 4 * 800, 0)),
        ("all_gather", Span(4, 4), Volume(600, 0)),
        ("reduce_scatter", Span(8, 2), Volume(700 / 2, 700 / 2)),
        ("reduce_scatter", Span(8, 1), Volume(0, 700)),
        ("all_to_all", Span(8, 2), Volume(100, 600)),
        ("send", Span(2, 1), Volume(0, 800)),
        ("all_reduce", Span(1, 1), Volume()),
    ],
)
def test_volumes_by_hand(collective: str, group: Span, sent: Volume) -> None:
    assert volume(collective, 800, group) == sent


def test_an_unknown_collective_is_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast is no collective"):
        volume("broadcast", 1, Span(2, 2))


def test_steps_of_a_ring() -> None:
    assert (ring_steps("all_reduce", 8), ring_steps("all_gather", 8), ring_steps("send", 8)) == (14, 7, 1)


def test_a_step_s_traffic_by_hand() -> None:
    """S 1024, H 512, two layers, TP 2 with SP, PP 2, DP 2 over two nodes of 4: everything by hand."""
    config = load(
        None,
        [
            "model.num_layers=2", "model.hidden_size=512", "model.num_attention_heads=8", "model.ffn_hidden_size=1024",
            "model.vocab_size=1024", "model.seq_length=1024", "parallel.world_size=8", "precision.bf16=true",
            "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true", "train.global_batch_size=8",
        ],
    ).config  # fmt: skip
    cluster = dataclasses.replace(CLUSTERS["h100-80gb"], gpus_per_node=4, nodes=2)
    entries = {
        (entry.axis, entry.collective): entry for entry in traffic(Question(config, cluster, PUBLISHED["hopper"]))
    }
    message = 2 * 1024 * 512  # bytes of the residual stream
    # A micro-batch in the first stage: 2 gathers forward, 2 + 2 backward (the saved inputs again), 1 of the embedding.
    gathers, scatters, micro_batches = 2 + 4 + 1, 2 + 2 + 1, 4
    assert entries["tp", "all_gather"].times == gathers * micro_batches
    assert entries["tp", "all_gather"].sent == Volume(gathers * micro_batches * message / 2, 0)
    assert entries["tp", "reduce_scatter"].sent == Volume(scatters * micro_batches * message / 2, 0)
    # One output onward, divided over tp; ranks 0 and 4 are in different nodes.
    assert entries["pp", "send"].sent == Volume(0, micro_batches * message / 2)
    layer = 512 * (3 * 512 + 512) // 2 + 512 * 3 * 1024 // 2 + 2 * 512
    weights = layer + 1024 * 512 // 2
    # dp 2 with stride 2: ranks 0 and 2, in one node.
    assert entries["dp-cp", "reduce_scatter"].sent == Volume(4 * weights / 2, 0)
    assert entries["dp-cp", "all_gather"].sent == Volume(2 * weights / 2, 0)
    assert len(entries) == 5
    assert by_link(list(entries.values())).between == micro_batches * message / 2


@pytest.mark.parametrize(
    ("ep", "etp", "group", "replicas"),
    [
        # Ranks 0 to 3 are node 0, 4 to 7 node 1, ...: an ep group counts up from its first rank in steps of etp.
        (4, 1, Span(4, 4), Span(4, 1)),  # 0 to 3; copies of its experts are on 4, 8, 12
        (8, 1, Span(8, 4), Span(2, 1)),  # 0 to 7
        (4, 2, Span(4, 2), Span(2, 1)),  # 0, 2 | 4, 6
        (8, 2, Span(8, 2), Span(1, 1)),  # 0, 2 | 4, 6 | 8, 10 | 12, 14
    ],
)
def test_tokens_to_experts_in_other_nodes_by_hand(ep: int, etp: int, group: Span, replicas: Span) -> None:
    """16 ranks in four nodes, TP 2 with SP, two layers of eight experts, two of them for every token."""
    config = load(
        None,
        [
            "model.num_layers=2", "model.hidden_size=512", "model.num_attention_heads=8", "model.vocab_size=1024",
            "model.seq_length=1024", "model.num_moe_experts=8", "model.moe_ffn_hidden_size=256",
            "model.moe_router_topk=2", "parallel.world_size=16", "parallel.tensor_model_parallel_size=2",
            f"parallel.expert_model_parallel_size={ep}", f"parallel.expert_tensor_parallel_size={etp}",
            "parallel.sequence_parallel=true", "train.global_batch_size=24", "precision.bf16=true",
        ],
    ).config  # fmt: skip
    cluster = dataclasses.replace(CLUSTERS["h100-80gb"], gpus_per_node=4, nodes=4)
    question = Question(config, cluster, PUBLISHED["hopper"])
    assert (span(question.layout, "ep", 0, 4), span(question.layout, "edp", 0, 4)) == (group, replicas)
    exchanged = next(entry for entry in traffic(question) if entry.axis == "ep")
    local = 1024 // 2 * 2 * 512 * 2  # bytes: this rank's tokens, each to two experts, 512 channels
    # Dispatch and combine, forward and backward, of two layers and three micro-batches.
    assert (exchanged.collective, exchanged.times) == ("all_to_all", 2 * 2 * 2 * 3)
    part = exchanged.times * local / ep
    assert exchanged.sent == Volume(part * (group.in_node - 1), part * (ep - group.in_node))
    reduced = {entry.collective: entry.sent for entry in traffic(question) if entry.axis == "edp"}
    held = 2 * 8 // ep * 3 * 512 * 256 // etp  # elements of two layers' experts
    if replicas.size == 1:
        assert not reduced
    else:
        share = (replicas.size - 1) / replicas.size
        assert reduced["reduce_scatter"] == Volume(0, share * 4 * held)


def test_a_cluster_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("like: h100\nname: ours\nnodes: 4\nnetwork_gb_per_second: 25\n")
    ours = cluster_of(str(file))
    assert (ours.name, ours.gpus, ours.network_gb_per_second) == ("ours", 32, 25)
    assert ours.memory_gib == CLUSTERS["h100-80gb"].memory_gib
    assert cluster_of("h100") is CLUSTERS["h100-80gb"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: h1000\n", "like = h1000 is no known cluster"),
        ("like: h100\nnetwork: 25\n", "network is no key of a cluster"),
        ("nodes: 4\n", "memory_gib, bf16_tflops"),
        ("like: h100\nnodes: 1.5\n", "nodes = 1.5 must be a whole number"),
        ("like: h100\nnetwork_gb_per_second: fast\n", "network_gb_per_second = 'fast' must be a number"),
        ("like: h100\nnetwork_gb_per_second: -1\n", "must be a number above 0"),
        ("like: h100\nmemory_gib: .nan\n", "must be a number above 0"),
        ("- 1\n", "must hold key: value lines"),
        ("a: [\n", "not readable as YAML"),
    ],
)
def test_a_wrong_cluster_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        cluster_of(str(file))


def test_parts_of_a_cluster() -> None:
    node = CLUSTERS["h100-80gb"]
    assert (node.of_gpus(4).gpus_per_node, node.of_gpus(64).nodes) == (4, 8)
    with pytest.raises(ConfigError, match="Nearest valid number: 8 or 16"):
        node.of_gpus(12)
    with pytest.raises(ConfigError, match="no such cluster and no such file"):
        cluster_of("h1000")
