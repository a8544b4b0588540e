"""The rules about experts: each is broken once, alone, and what stands beside it passes."""

from __future__ import annotations

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations

MOE = ["--num-moe-experts", "8"]
SIGMOID = [*MOE, "--moe-router-score-function", "sigmoid"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules"]


def broken(overrides: list[str], world_size: int | None = None) -> list[str]:
    resolved = load(None, overrides)
    return violations(resolved.config, world_size, provenance=resolved.provenance)


ACCEPTED = [
    MOE,
    [*MOE, *EP2, *TP2],
    [*MOE, *EP2, *TP2, "--expert-tensor-parallel-size", "1", "--moe-token-dispatcher-type", "allgather"],
    [*MOE, "--expert-tensor-parallel-size", "2", "--world-size", "4"],
    [*MOE, *EP2, "--pipeline-model-parallel-size", "2", "--num-layers", "4", "--moe-first-dense-layers", "1"],
    [*MOE, "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "1e-2", "--moe-z-loss-coeff=1"],
    [*MOE, "--moe-router-topk", "1", "--moe-router-pre-softmax"],
    [*MOE, "--moe-router-num-groups", "4", "--moe-router-group-topk", "2", "--moe-router-topk", "4"],
    [*SIGMOID, "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "1e-2"],
    [*MOE, "--moe-shared-expert-intermediate-size", "64", "--moe-shared-expert-gate"],
    [*MOE, "--moe-expert-capacity-factor", "1.5", "--moe-token-drop-policy", "position"],
    [*MOE, *EP2, "--moe-grouped-gemm"],
    [*MOE, *TP2, "--ffn-hidden-size", "129", "--moe-ffn-hidden-size", "128"],  # no layer has the dense width
    [*MOE, "--no-swiglu", "--openai-gelu"],
    [*MOE, "--moe-shared-expert-intermediate-size", "64", *SELECTIVE, "core_attn", "moe", "shared_experts"],
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: list[str]) -> None:
    assert broken(overrides) == []


REFUSED = [
    (
        ["--moe-router-topk=4", "--moe-z-loss-coeff=1e-3"],
        ("topk = 4 (command line) and model.moe_z_loss", "Set model."),
    ),
    (EP2, ("parallel.expert_model_parallel_size = 2", "num_moe_experts = null", "dense")),
    ([*MOE, "--moe-first-dense-layers", "2"], ("moe_first_dense_layers = 2", "no layer")),
    (
        [*MOE, "--expert-model-parallel-size", "3", "--global-batch-size", "6"],
        ("num_moe_experts = 8", "size: 2 or 4.", "experts: 6 or 9."),
    ),
    ([*MOE, *TP2, "--moe-ffn-hidden-size", "97"], ("moe_ffn_hidden_size = 97", "97 inner channels", "2 ranks")),
    ([*MOE, *EP2, "--world-size", "3", "--global-batch-size", "6"], ("world size 3", "1 x 2 x 1 = 2", "2 or 4")),
    ([*MOE, *TP2, "--moe-shared-expert-intermediate-size", "65"], ("size = 65", "64 or 66")),
    (
        [*MOE, "--tensor-model-parallel-size", "2", "parallel.sequence_parallel=false"],
        ("sequence_parallel = false", "same tokens"),
    ),
    ([*MOE, "--moe-router-topk", "9"], ("moe_router_topk = 9", "more experts than")),
    ([*MOE, "--moe-router-topk", "1"], ("moe_router_pre_softmax=true", "learn nothing")),
    ([*SIGMOID, "--moe-router-pre-softmax"], ("score_function = sigmoid", "no softmax")),
    ([*MOE, "--moe-router-num-groups", "4"], ("moe_router_group_topk = null", "need each other")),
    ([*MOE, "--moe-router-num-groups", "3", "--moe-router-group-topk", "2"], ("groups = 3", "groups: 2 or 4.")),
    ([*MOE, "--moe-router-num-groups", "2", "--moe-router-group-topk", "3"], ("group_topk = 3", "group_topk: 2.")),
    (
        [*MOE, "--moe-router-num-groups", "4", "--moe-router-group-topk", "2", "--moe-router-topk", "3"],
        ("topk = 3", "best experts", "group_topk: 1 or 3."),
    ),
    ([*MOE, "--moe-aux-loss-coeff", "1e-2"], ('type = "none"', "Set model.moe_router_load_balancing_type=aux_loss")),
    ([*MOE, "--moe-router-load-balancing-type", "aux_loss"], ("coeff = 0.0", "no weight")),
    ([*MOE, "--moe-router-enable-expert-bias"], ("score_function = softmax", "sigmoid")),
    ([*SIGMOID, "--moe-router-bias-update-rate", "1e-2"], ("update_rate = 0.01", "no bias")),
    ([*MOE, "--moe-shared-expert-gate"], ("gate = true", "no shared expert")),
    ([*MOE, "--moe-token-drop-policy", "position"], ("policy = position", "no token is dropped")),
    ([*MOE, "--add-bias-linear"], ("add_bias_linear = true", "different experts")),
    ([*MOE, "--moe-grouped-gemm", "--device", "cpu"], ("device = cpu", "needs a GPU")),
    ([*MOE, *EP2, *TP2, "--moe-grouped-gemm"], ("moe_grouped_gemm = true", "PR 5916")),
    ([*SELECTIVE, "moe"], ("recompute_modules", "num_moe_experts = null")),
    ([*MOE, *SELECTIVE, "shared_experts"], ("intermediate_size = null", "shared_experts is a part")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_refused_alone_with_keys_values_and_way_out(overrides: list[str], words: tuple[str, ...]) -> None:
    found = broken(overrides)
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found[0]


@pytest.mark.parametrize(
    ("refused", "core"),
    [
        ([*MOE, "--moe-router-topk", "1"], {"moe_router_topk": 1}),
        ([*MOE, "--moe-router-enable-expert-bias"], {"moe_router_enable_expert_bias": True}),
        ([*MOE, *TP2, "--add-bias-linear"], {"add_bias_linear": True, "tensor_model_parallel_size": 2}),
        (
            [*MOE, "--moe-router-num-groups", "3", "--moe-router-group-topk", "2"],
            {"moe_router_num_groups": 3, "moe_router_group_topk": 2, "add_bias_linear": False},
        ),
    ],
)
def test_what_core_refuses_is_refused_here_first(refused: list[str], core: dict[str, object]) -> None:
    assert broken(refused)
    with pytest.raises((AssertionError, ValueError)):
        TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, num_moe_experts=8, **core)


def test_fewest_ranks_hold_replicas_and_experts() -> None:
    """Eight sets of experts over four tp ranks: neither four ranks nor one replica would do."""
    wide = load(None, [*MOE, *TP2, "--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1"])
    assert wide.config.parallel.smallest_world_size == 8
    assert violations(wide.config) == []
    assert load(None, TP2).config.parallel.smallest_world_size == 2
