"""Norms of heads, latent attention and multi-token prediction: n ranks compute what one rank computes, in float64."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.config import TrainConfig
from tests import runs
from tests.breadth import BREADTH, widely
from tests.ranks import run_ranks
from tests.training import SMALL, VOCAB, Outcome, Task, build, micro_batches, train, worst_difference

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}
SP: dict[str, Any] = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "dp2-overlap": (2, {"overlap_param_gather": True, "ddp_bucket_size": 20000}),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2-pp2-sp": (4, TP2 | PP2 | SP),
}

LATENT = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    multi_latent_attention=True,
    qk_layernorm=True,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=12,
    qk_pos_emb_head_dim=8,
    v_head_dim=10,  # narrower than queries and keys
    rope_type="yarn",
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=16,
    mscale_all_dim=1.0,
)
PREDICTING = replace(SMALL, mtp_num_layers=2, mtp_loss_scaling_factor=0.3)
DEEPSEEK = replace(
    LATENT,
    num_layers=2,
    mtp_num_layers=1,
    num_moe_experts=4,
    moe_first_dense_layers=1,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=48,
    moe_router_score_function="sigmoid",
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_topk_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=1e-2,
)
MODELS = {
    "qk-norm": replace(SMALL, qk_layernorm=True),
    "qk-layernorm": replace(SMALL, qk_layernorm=True, normalization="LayerNorm", num_query_groups=None),
    "latent": LATENT,
    "latent-plain": replace(
        LATENT, qk_layernorm=False, q_lora_rank=None, rope_type="rope", mscale_all_dim=0.0, add_bias_linear=True
    ),
    "predicting": PREDICTING,
    "predicting-tied": replace(
        PREDICTING, mtp_num_layers=1, untie_embeddings_and_output_weights=False, position_embedding_type="none"
    ),
    "latent-predicting": replace(LATENT, mtp_num_layers=1),
    "deepseek": DEEPSEEK,
}
CASES = [
    *(("qk-norm", layout) for layout in ("tp2", "tp2-sp", "tp2-pp2-sp")),
    ("qk-layernorm", "tp2"),
    *(("latent", layout) for layout in ("tp2", "tp2-sp", "pp2-vpp2", "dp2-overlap", "tp2-pp2-sp")),
    *(("latent-plain", layout) for layout in ("tp2", "tp2-sp")),
    *(("predicting", layout) for layout in ("tp2", "tp2-sp", "pp2", "dp2-overlap", "tp2-pp2-sp")),
    *(("predicting-tied", layout) for layout in ("tp2", "pp2-vpp2")),
    *(("deepseek", layout) for layout in ("ep2", "tp2-pp2-sp")),
]


def task_of(name: str, **other: Any) -> Task:
    return Task(model=MODELS[name], iters=3, **other)


@cache
def one_rank(task: Task) -> Outcome:
    """The reference run of a task."""
    result: Outcome = run_ranks(train, 1, task)[0]
    return result


def check_equal(found: Outcome, expected: Outcome) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)
    # Core takes the norm in fp32, whatever the gradients are.
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6, abs=0)
    for what, bound in (("initial", 0.0), ("gradients", 1e-9), ("weights", 1e-6)):
        error, name = worst_difference(getattr(found, what), getattr(expected, what))
        assert error <= bound, f"{what}: {name} differs by {error:.2e} of its norm"


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_layout_equals_one_rank(model: str, layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    task = task_of(model)
    check_equal(run_ranks(train, world_size, task.on(**degrees))[0], one_rank(task))


@pytest.mark.parametrize("layout", widely(["tp2", "pp2-vpp2", "cp2"], "pp2-vpp2"))
def test_packed_documents_equal_one_rank(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    task = task_of("latent-predicting", packed=True)
    check_equal(run_ranks(train, world_size, task.on(**degrees))[0], one_rank(task))
    assert one_rank(task).losses[0] != one_rank(task_of("latent-predicting")).losses[0]


RECOMPUTE = {
    "full": TrainConfig(
        global_batch_size=4, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
    "selective": TrainConfig(
        global_batch_size=4, recompute_granularity="selective", recompute_modules=("core_attn", "mla_up_proj", "mlp")
    ),
}


@pytest.mark.parametrize(
    ("recompute", "layout"),
    [("full", "tp2-sp"), pytest.param("full", "tp2", marks=BREADTH), ("selective", "tp2-pp2-sp")],
)
def test_recompute_changes_nothing(recompute: str, layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    task = task_of("latent-predicting", packed=True)
    check_equal(
        run_ranks(train, world_size, replace(task, train=RECOMPUTE[recompute]).on(**degrees))[0], one_rank(task)
    )


def predictions(task: Task) -> dict[str, list[float]]:
    """Sums and tokens of every depth over one batch: the model's, and those of full logits position by position."""
    from megatron_slm.parallel.gradients import unwrap

    groups, chunks, _ = build(task)
    model = unwrap(chunks[0])
    batch = micro_batches(task, 0, groups)[0]
    documents = batch.get("document_ids")
    arguments = {name: batch[name] for name in ("position_ids", "labels", "loss_mask")}
    found = model(input_ids=batch["tokens"], attention_mask=documents, **arguments)
    depths = int(task.model.mtp_num_layers or 0)
    main = model.eval()(input_ids=batch["tokens"], attention_mask=documents, **arguments)
    expected = [main[0].item(), main[1].item(), main[2].item()]
    hidden: list[torch.Tensor] = []
    handle = model.mtp.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model.train()(input_ids=batch["tokens"], attention_mask=documents, **arguments)
    handle.remove()
    labels, mask = batch["labels"][0], batch["loss_mask"][0]
    for depth in range(1, depths + 1):
        logits = hidden[0].chunk(1 + depths)[depth][:, 0] @ model.output_layer.weight[:VOCAB].t()
        total, tokens = 0.0, 0.0
        for position in range(task.model.seq_length - depth):
            later = position + depth
            if documents is not None and documents[0, later] != documents[0, position]:
                continue
            total -= float(mask[later] * torch.log_softmax(logits[position], dim=-1)[labels[later]])
            tokens += float(mask[later])
        expected += [total, tokens]
        expected[0] += task.model.mtp_loss_scaling_factor / depths * total
    logits = model(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=documents)
    return {"found": found.tolist(), "expected": expected, "logits": list(logits.shape)}


@pytest.mark.parametrize("packed", [False, True])
def test_predictions_are_those_of_full_logits(packed: bool) -> None:
    result = run_ranks(predictions, 1, task_of("predicting", packed=packed))[0]
    assert result["found"] == pytest.approx(result["expected"], rel=1e-9)
    assert result["logits"] == [1, 32, 512], "without labels the main logits alone"


def refusal(model: ModelConfig) -> str:
    """Why this model is not built on a GPU of an environment without Transformer Engine."""
    from megatron_slm.errors import ConfigError
    from megatron_slm.parallel.specs import choose_spec

    with pytest.raises(ConfigError) as caught:
        choose_spec("cuda", model, packed_documents=False)
    return str(caught.value)


def test_a_gpu_without_transformer_engine_is_refused_latent_attention() -> None:
    assert "transformer-engine" in run_ranks(refusal, 1, LATENT)[0]


MODEL = (
    "model.num_query_groups=null",
    "model.multi_latent_attention=true",
    "model.qk_layernorm=true",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=12",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=6",
    "model.mtp_num_layers=2",
    "train.eval_interval=2",
)
STAGES = "parallel.pipeline_model_parallel_size=2"
TENSOR = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


def test_a_run_resumes_bitwise_and_under_another_layout(tmp_path: Path) -> None:
    """Over two pipeline stages the embedding has a copy on the second, of which the checkpoint holds one."""
    data, own = runs.corpus(tmp_path), (*MODEL, "train.train_iters=4")
    straight, resumed, moved = (tmp_path / name for name in ("straight", "resumed", "moved"))
    assert runs.train(straight, data, 2, *own, STAGES) == 0
    assert runs.train(resumed, data, 2, *own, STAGES, "train.exit_interval=2") == 75
    shutil.copytree(resumed, moved)
    assert runs.train(resumed, data, 2, *own, STAGES) == 0
    assert runs.losses(straight) == runs.losses(resumed)
    first, second = (runs.contents(runs.checkpoint_path(run, 4)) for run in (straight, resumed))
    assert "mtp.layers.1.eh_proj.weight" in first and runs.differences(first, second) == []
    assert runs.train(moved, data, 4, *own, *TENSOR) == 0
    for before, after in zip(runs.records(straight), runs.records(moved), strict=True):
        for name in ("lm_loss", "objective", "mtp_1_loss", "mtp_2_loss"):
            assert after[name] == pytest.approx(before[name], rel=1e-6), name


def held(models: list[ModelConfig]) -> list[tuple[int, int, list[float]]]:
    """Parameters of each model built on this rank (and its routers' balancing biases), those that are counted, and the
    deviation of every matrix."""
    from megatron.core import parallel_state

    from megatron_slm.model.counts import parameters

    found = []
    for model in models:
        _, chunks, _ = build(Task(model=model))
        biases = sum(buffer.numel() for name, buffer in chunks[0].named_buffers() if name.endswith("expert_bias"))
        deviations = [float(param.std()) for param in chunks[0].parameters() if param.dim() > 1]
        built = sum(param.numel() for param in chunks[0].parameters()) + biases
        found.append((built, parameters(model, 512), deviations))
        parallel_state.destroy_model_parallel()
    return found


def test_built_models_have_the_counted_parameters_and_initial_deviations() -> None:
    shapes = [*MODELS.values(), replace(DEEPSEEK, multi_latent_attention=False, moe_layer_freq=2)]
    for built, counted, deviations in run_ranks(held, 1, shapes)[0]:
        assert built == counted
        # 0.02, or less by sqrt(2 x layers) where a matrix writes into the residual stream: core itself fills none.
        assert all(0.006 < deviation < 0.025 for deviation in deviations), deviations
