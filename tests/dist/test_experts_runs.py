"""Whole runs of mixtures of experts: the log says the same of every layout, and a resumed run is the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.train.router_statistics import BY_LAYER
from tests import runs

EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=48",
    "model.moe_first_dense_layers=1",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_bias_update_rate=0.001",
    "model.moe_router_load_balancing_type=seq_aux_loss",
    "model.moe_aux_loss_coeff=0.01",
    "model.moe_z_loss_coeff=0.001",
    "model.moe_expert_capacity_factor=1.0",
    "model.moe_shared_expert_intermediate_size=32",
    "optimizer.clip_grad=0.0",
    "train.eval_iters=0",
)
EP2 = "parallel.expert_model_parallel_size=2"
EP2_TP2 = (EP2, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
EP2_PP2 = (EP2, "parallel.pipeline_model_parallel_size=2")
NAMES = ("load_max_over_mean", "load_entropy", "probability_entropy", "dropped_share", "aux_loss", "z_loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("layout", [EP2_TP2, EP2_PP2], ids=["ep2-tp2", "ep2-pp2"])
def test_the_log_says_the_same_of_every_layout(tmp_path: Path, data: Path, layout: tuple[str, ...]) -> None:
    """In float64, every second step and the last."""
    common = (
        *EXPERTS,
        "precision.fp64=true",
        "log.log_interval=2",
        "log.layer_norms_interval=2",
        "train.train_iters=3",
    )
    assert runs.train(tmp_path / "one", data, 1, *common) == 0
    assert runs.train(tmp_path / "several", data, 4, *common, *layout) == 0
    expected, found = (runs.records(tmp_path / name) for name in ("one", "several"))
    assert [f"router_{NAMES[0]}" in record for record in expected] == [False, True, True]
    for one, several in zip(expected[1:], found[1:], strict=True):
        for name in (f"router_{name}" for name in NAMES):
            assert several[name] == pytest.approx(one[name], rel=1e-9), name
            assert several[BY_LAYER][name] == pytest.approx(one[BY_LAYER][name], rel=1e-9), name
        assert list(one[BY_LAYER]["router_load_entropy"]) == ["layer_1", "layer_2", "layer_3"]
        assert one["router_load_max_over_mean"] > 1.0 and 0.0 < one["router_dropped_share"] < 0.5
        assert 0.5 < one["router_load_entropy"] < 1.0 and one["router_aux_loss"] >= 1.0
    one, several = (runs.records(tmp_path / name, "dynamics.jsonl")[0] for name in ("one", "several"))
    for quantity in ("grad_norm", "update_norm", "weight_norm", "activation_rms"):
        assert several[quantity] == pytest.approx(one[quantity], rel=1e-9), quantity
    log = (tmp_path / "several" / "log.txt").read_text()
    assert log.count("router load max over mean: ") == 2 and "router aux loss: " in log


@pytest.mark.parametrize("precision", ["precision.bf16=true", "parallel.use_distributed_optimizer=false"])
def test_resume_is_bitwise(tmp_path: Path, data: Path, precision: str) -> None:
    """Both optimizers, their average, and the router's bias, which is no parameter and stays in fp32."""
    common = (*EXPERTS, EP2, precision, "train.train_iters=3", "train.ema_decay=0.5")
    assert runs.train(tmp_path / "straight", data, 2, *common) == 0
    assert runs.train(tmp_path / "resumed", data, 2, *common, "train.exit_interval=2") == 75
    assert runs.train(tmp_path / "resumed", data, 2, *common) == 0
    assert runs.losses(tmp_path / "straight") == runs.losses(tmp_path / "resumed")
    first, second = (runs.contents(runs.checkpoint_path(tmp_path / name, 3)) for name in ("straight", "resumed"))
    assert runs.differences(first, second) == []
    (bias,) = (value for name, value in first.items() if name.endswith("layers.1.mlp.router.expert_bias"))
    assert str(bias.dtype) == "torch.float32" and float(bias.abs().max()) >= 0.001 - 1e-6
