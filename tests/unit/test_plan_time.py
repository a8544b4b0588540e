"""Operations, schedules and seconds: against counts, against formulas, and against printed step times."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.model.counts import flops_per_token, parameters
from megatron_slm.plan import timeline
from megatron_slm.plan.cluster import CLUSTERS
from megatron_slm.plan.cost import Costs
from megatron_slm.plan.layer import Kernels, layer_pass
from megatron_slm.plan.memory_estimate import allocated_bytes, layer_activation_bytes
from megatron_slm.plan.ops import Attention, Exchange, Gemm
from megatron_slm.plan.predict import Prediction, Question, chunk_passes, least_seconds, predict
from megatron_slm.plan.rates import PUBLISHED
from megatron_slm.plan.timeline import Chunk, least_seconds as least_of_schedule, play
from megatron_slm.plan.weights import Weights, stage_weights

EXPERTS = ["model.num_moe_experts=8", "model.moe_ffn_hidden_size=256", "model.moe_shared_expert_intermediate_size=256"]
LATENT = [
    "model.multi_latent_attention=true", "model.q_lora_rank=128", "model.kv_lora_rank=64", "model.qk_head_dim=32",
    "model.qk_pos_emb_head_dim=16", "model.v_head_dim=32",
]  # fmt: skip
MODELS: dict[str, list[str]] = {
    "dense": [],
    "grouped, tied": ["model.num_query_groups=2", "model.untie_embeddings_and_output_weights=false"],
    "biases": ["model.swiglu=false", "model.add_bias_linear=true", "model.normalization=LayerNorm"],
    "experts": EXPERTS,
    "latent": LATENT,
    "latent experts, a dense layer": [*LATENT, *EXPERTS, "model.moe_first_dense_layers=1"],
    "predictions": ["model.mtp_num_layers=1"],
}


def config_of(*tokens: str, layers: int = 4, hidden: int = 512) -> RunConfig:
    shape = [f"model.num_layers={layers}", f"model.hidden_size={hidden}", "model.num_attention_heads=8"]
    fixed = ["model.vocab_size=1024", "model.seq_length=1024", "precision.bf16=true"]
    return load(None, [*shape, *fixed, *tokens]).config


def question_of(config: RunConfig, gpus: int = 8, **kernels: Any) -> Question:
    return Question(config, CLUSTERS["h100-80gb"].of_gpus(gpus), PUBLISHED["hopper"], Kernels(**kernels))


@pytest.mark.parametrize("model", MODELS)
def test_products_are_those_that_are_counted(model: str) -> None:
    """Forward and backward FLOPs of a rank without parallelism are the model's, apart from backward's second scores."""
    config = config_of(*MODELS[model])
    products = attention = 0.0
    for each, count in chunk_passes(question_of(config))[0][0]:
        for op in (*each.forward, *each.backward):
            if isinstance(op, Gemm):
                products += count * op.flops
            elif isinstance(op, Attention):
                attention += count * op.flops
    # Fused attention runs 2 products forward and 5 backward; 6 are counted.
    total = (products + attention * 6 / 7) / config.model.seq_length
    assert total == pytest.approx(flops_per_token(config.model, 1024), rel=1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stages", [1, 2])
def test_weights_of_the_ranks_are_the_model_s(model: str, stages: int) -> None:
    config = config_of(*MODELS[model], f"parallel.pipeline_model_parallel_size={stages}", "parallel.world_size=8")
    held = sum((sum(chunks, Weights()) for chunks in stage_weights(config)), Weights()).total
    copies = 0
    if stages == 2:  # a tied matrix and the predictions' embedding lie on the last stage once more
        copies = (not config.model.untie_embeddings_and_output_weights) + bool(config.model.mtp_num_layers)
    assert held == parameters(config.model, 1024) + copies * 1024 * 512


def test_tensor_parallelism_divides_products_and_adds_exchanges() -> None:
    whole = layer_pass(config_of(), moe=False, kernels=Kernels())
    tokens = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
    divided = layer_pass(config_of(*tokens), moe=False, kernels=Kernels())

    def products(ops: Any) -> float:
        return sum(op.flops for op in ops if isinstance(op, Gemm))

    assert products(divided.forward) == products(whole.forward) / 4
    exchanged = [op.collective for op in divided.forward if isinstance(op, Exchange)]
    assert exchanged == ["all_gather", "reduce_scatter", "all_gather", "reduce_scatter"]
    back = sorted(op.collective for op in divided.backward if isinstance(op, Exchange))
    assert back == ["all_gather"] * 4 + ["reduce_scatter"] * 2, "two of the gathers rebuild the saved inputs"


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_recomputation_runs_the_forward_pass_again(sequence_parallel: bool) -> None:
    tokens = ["parallel.tensor_model_parallel_size=2", f"parallel.sequence_parallel={str(sequence_parallel).lower()}"]
    plain = layer_pass(config_of(*tokens), moe=False, kernels=Kernels())
    full = ["train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1"]
    again = layer_pass(config_of(*tokens, *full), moe=False, kernels=Kernels())
    assert again.forward == plain.forward
    assert again.backward == plain.forward + plain.backward
    selective = ["train.recompute_granularity=selective", "train.recompute_modules=mlp"]
    part = layer_pass(config_of(*tokens, *selective), moe=False, kernels=Kernels())
    assert len(plain.backward) < len(part.backward) < len(again.backward)


def test_an_exchange_behind_a_product_costs_what_is_left() -> None:
    question = question_of(config_of("parallel.tensor_model_parallel_size=8", "parallel.world_size=8"))
    costs = question.costs(0)
    product = Gemm("x", 4096, 4096, 4096)
    alone = Exchange("x", "all_reduce", "tp", 1e9)
    hidden = dataclasses.replace(alone, behind=product)
    assert costs.exposed_seconds(hidden) == pytest.approx(
        costs.exposed_seconds(alone) - costs.kernel_seconds(product), rel=1e-12
    )
    assert costs.exposed_seconds(dataclasses.replace(hidden, bytes=1e3)) == 0.0
    assert costs.of([hidden]).volume == costs.volume(alone), "its bytes are sent all the same"


def test_a_roofline() -> None:
    costs = Costs(CLUSTERS["h100-80gb"], PUBLISHED["hopper"], question_of(config_of("parallel.world_size=8")).layout)
    long, thin = Gemm("a", 8192, 8192, 8192), Gemm("b", 1, 8192, 8192)
    reached = long.flops / costs.kernel_seconds(long) / 989e12
    assert 0.5 < reached < PUBLISHED["hopper"].gemm_efficiency
    assert costs.kernel_seconds(thin) >= costs.streaming_seconds(thin.bytes), "a vector times a matrix moves the matrix"


@pytest.mark.parametrize("micro_batches", [8, 16, 64])
def test_one_forward_one_backward_by_the_formula(micro_batches: int) -> None:
    """(m + p - 1)(f + b), and a bubble rate of (p - 1) / (m + p - 1) (arXiv 2104.04473, section 2.2.1)."""
    stages = [[Chunk(1.0, 2.0)]] * 4
    played = play(stages, micro_batches, [0.0] * 4, sends_hidden=False)
    assert played.seconds == pytest.approx(3.0 * (micro_batches + 3))
    assert played.bubble_share == pytest.approx(3 / (micro_batches + 3))


@pytest.mark.parametrize(("chunks", "micro_batches"), [(2, 8), (3, 16), (4, 64)])
def test_interleaving_divides_the_bubble(chunks: int, micro_batches: int) -> None:
    """The bubble is (p - 1)(f + b) / v (arXiv 2104.04473, section 2.2.2)."""
    stages = [[Chunk(1.0 / chunks, 2.0 / chunks)] * chunks] * 4
    played = play(stages, micro_batches, [0.0] * 4, sends_hidden=True)
    assert played.seconds == pytest.approx(3.0 * micro_batches + 9.0 / chunks)


@pytest.mark.parametrize(("chunks", "micro_batches"), [(1, 64), (1, 67), (2, 64)])
@pytest.mark.parametrize("hidden", [True, False])
def test_what_is_not_played_takes_as_long_as_the_rounds_before(chunks: int, micro_batches: int, hidden: bool) -> None:
    uneven = [[Chunk(1.0 + 0.1 * stage + 0.05 * chunk, 2.0) for chunk in range(chunks)] for stage in range(4)]
    quick = play(uneven, micro_batches, [0.2] * 4, sends_hidden=hidden)
    slow = timeline._play(uneven, micro_batches, [0.2] * 4, hidden)
    assert quick.seconds == pytest.approx(slow.seconds, rel=2e-3)
    assert quick.busy == pytest.approx(slow.busy)
    assert least_of_schedule(uneven, micro_batches) <= slow.seconds


def test_messages_that_block_cost_their_sender() -> None:
    stages = [[Chunk(1.0, 2.0)]] * 4
    hidden = play(stages, 32, [0.1] * 4, sends_hidden=True).seconds
    blocking = play(stages, 32, [0.1] * 4, sends_hidden=False).seconds
    assert hidden < blocking


def test_a_step_is_no_shorter_than_its_bound() -> None:
    for tokens in ([], ["parallel.pipeline_model_parallel_size=2"], ["parallel.tensor_model_parallel_size=2"]):
        question = question_of(config_of(*tokens, "parallel.world_size=8", "train.global_batch_size=32"))
        assert 0 < least_seconds(question) <= predict(question).step_seconds


def test_overlap_hides_the_reduction_but_for_its_last_bucket() -> None:
    tokens = ["parallel.world_size=64", "train.global_batch_size=256"]

    def of(option: str) -> Prediction:
        return predict(question_of(config_of(*tokens, option, layers=32, hidden=4096), 64))

    overlapped, plain = of("parallel.overlap_param_gather=true"), of("parallel.overlap_grad_reduce=false")
    assert overlapped.reduction_seconds < plain.reduction_seconds
    assert overlapped.gather_seconds < plain.gather_seconds
    assert overlapped.step_seconds < plain.step_seconds


def test_the_vocabulary_is_needed() -> None:
    config = config_of()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=None))
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        predict(question_of(config))


# arXiv 2205.05198, tables 3 and 5: layers, hidden, heads, tp, pp, vpp, micro-batch, global batch, seconds with full
# recomputation, seconds with selective recomputation and sequence parallelism.
PRINTED = [
    (48, 6144, 64, 8, 1, 1, 4, 4, 1.42, 1.10),
    (96, 12288, 96, 8, 8, 3, 1, 64, 18.13, 13.75),
    (105, 20480, 128, 8, 35, 3, 1, 280, 49.05, 37.83),
    (128, 25600, 160, 8, 64, 1, 1, 512, 94.42, 71.49),
]
OF_2022 = Kernels(
    flash_attention=False,
    scatters_sends=True,
    hides_interleaved_sends=False,
    accumulates_in_product=True,
    gradient_bytes=2,
    optimizer_bytes_per_parameter=60,
)


def test_step_times_of_2022_with_rates_fitted_elsewhere() -> None:
    """At most 8 % on average; the rates come from other tables (``plan.rates``), ``OF_2022`` was set by hand."""
    errors = []
    for layers, hidden, heads, tp, pp, vpp, micro, batch, full, selective in PRINTED:
        shared = [
            f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.num_attention_heads={heads}",
            "model.vocab_size=51200", "model.seq_length=2048", "model.swiglu=false", "model.normalization=LayerNorm",
            "model.position_embedding_type=learned_absolute", "model.add_bias_linear=true", "precision.bf16=true",
            "model.untie_embeddings_and_output_weights=false", "model.attention_dropout=0.1",
            "model.hidden_dropout=0.1", f"parallel.world_size={tp * pp}", f"train.micro_batch_size={micro}",
            f"train.global_batch_size={batch}", f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}", "parallel.use_distributed_optimizer=false",
            f"parallel.virtual_pipeline_model_parallel_size={vpp}", "parallel.overlap_grad_reduce=false",
        ]  # fmt: skip
        for seconds, recompute in (
            (full, ["full", "train.recompute_method=uniform", "train.recompute_num_layers=1"]),
            (selective, ["selective", "parallel.sequence_parallel=true"]),
        ):
            config = load(None, [*shared, f"train.recompute_granularity={recompute[0]}", *recompute[1:]]).config
            cluster = CLUSTERS["a100-80gb"].of_gpus(tp * pp)
            found = predict(Question(config, cluster, PUBLISHED["ampere"], OF_2022))
            errors.append(found.step_seconds / seconds - 1)
    assert statistics.mean(map(abs, errors)) <= 0.08
    assert max(map(abs, errors)) <= 0.12


def test_block_recomputes_the_first_layers_of_every_chunk() -> None:
    """Eight layers on two stages: two of every four run their forward pass again, and two are kept whole."""
    pipeline = ["parallel.pipeline_model_parallel_size=2", "train.global_batch_size=16", "parallel.world_size=8"]

    def asked(method: str, layers: int) -> RunConfig:
        again = [f"train.recompute_method={method}", f"train.recompute_num_layers={layers}"]
        return config_of(*pipeline, "train.recompute_granularity=full", *again, layers=8)

    none, half, all_of_them = config_of(*pipeline, layers=8), asked("block", 2), asked("uniform", 1)

    def products(config: RunConfig) -> float:
        last = chunk_passes(question_of(config))[0][0]
        return sum(op.flops * count for each, count in last for op in each.backward if isinstance(op, Gemm | Attention))

    assert products(half) - products(none) == pytest.approx((products(all_of_them) - products(none)) / 2)
    held = [allocated_bytes(one, question_of(one).layout)[0] for one in (none, half, all_of_them)]
    live = layer_activation_bytes(none, moe=False)  # of the one layer that is being recomputed
    assert held[0] - held[1] == pytest.approx((held[0] - held[2] + live) / 2 - live)
