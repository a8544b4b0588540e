"""Plans in FP8: operations, seconds and memory."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.cluster import CLUSTERS, Cluster
from megatron_slm.plan.cost import FP8_SHARE, Costs
from megatron_slm.plan.memory_estimate import allocated_bytes, layer_activation_bytes
from megatron_slm.plan.ops import Exchange, Gemm, Streaming
from megatron_slm.plan.predict import Question, chunk_passes, predict
from megatron_slm.plan.rates import PUBLISHED
from megatron_slm.plan.volumes import traffic
from megatron_slm.plan.weights import linear_weights

H100 = CLUSTERS["h100-80gb"]
SHAPE = (
    "model.num_layers=4", "model.hidden_size=4096", "model.num_attention_heads=32", "model.ffn_hidden_size=8192",
    "model.vocab_size=32000", "model.seq_length=4096", "precision.bf16=true", "parallel.world_size=8",
    "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "train.global_batch_size=16",
)  # fmt: skip
FP8 = ("precision.fp8=hybrid", "precision.fp8_recipe=tensorwise")
GATHERED = (*FP8, "precision.fp8_param_gather=true")
EXPERTS = ("model.num_moe_experts=8", "model.moe_ffn_hidden_size=2048", "parallel.expert_model_parallel_size=2")


def config(*overrides: str) -> RunConfig:
    return load(None, [*SHAPE, *overrides]).config


def question(*overrides: str, cluster: Cluster = H100) -> Question:
    return Question(config(*overrides), cluster.of_gpus(8), PUBLISHED["hopper"])


def ops(*overrides: str) -> list[object]:
    passes = [each for stage in chunk_passes(question(*overrides)) for chunk in stage for each, _ in chunk]
    return [op for each in passes for op in (*each.forward, *each.backward)]


def test_layers_multiply_in_fp8_and_the_output_layer_and_routers_do_not() -> None:
    gemms = [op for op in ops(*FP8, *EXPERTS) if isinstance(op, Gemm)]
    other = {op.name.split()[0] for op in gemms if not op.fp8}
    assert other == {"logits", "router"}
    assert {"qkv", "projection", "expert"} == {op.name.split()[0] for op in gemms if op.fp8}
    assert not any(op.fp8 for op in ops(*EXPERTS) if isinstance(op, Gemm))


def test_inputs_and_gradients_are_copied_once() -> None:
    copied = [op for op in ops(*FP8) if isinstance(op, Streaming) and op.name.endswith("in FP8")]
    assert len(copied) == 4 * 2  # of one layer: four matrices
    tokens, width = 4096, 4096
    assert next(op.bytes for op in copied if op.name == "qkv input in FP8") == tokens * width * (2 + 1 + 1)


def test_gathered_inputs_and_parameters_halve() -> None:
    def gathered(*overrides: str) -> float:
        return sum(op.bytes for op in ops(*overrides) if isinstance(op, Exchange) and op.collective == "all_gather")

    # Of one layer: two inputs, both again, two gradients; embedding's and output layer's stay in bf16.
    assert gathered() - gathered(*FP8) == 6 * 4096 * 4096
    sent = [{e.collective: e for e in traffic(question(*o)) if e.axis == "dp-cp"} for o in (FP8, GATHERED)]
    assert sent[0]["reduce_scatter"].sent == sent[1]["reduce_scatter"].sent
    assert sent[1]["all_gather"].sent.total < sent[0]["all_gather"].sent.total


def test_a_product_takes_its_share_of_the_fp8_peak() -> None:
    asked = question(*FP8)
    costs = Costs(asked.cluster, dataclasses.replace(asked.rates, op_seconds=0.0), asked.layout)
    wide = Gemm("", 8192, 8192, 8192)
    ratio = costs.kernel_seconds(wide) / costs.kernel_seconds(dataclasses.replace(wide, fp8=True))
    assert ratio == pytest.approx(FP8_SHARE * 1979 / 989)
    assert 1.2 < predict(question()).step_seconds / predict(asked).step_seconds < FP8_SHARE * 1979 / 989


def test_without_an_fp8_peak_or_the_recipe_there_is_no_prediction() -> None:
    with pytest.raises(ConfigError, match="its peak in FP8 is not known"):
        predict(question(*FP8, cluster=dataclasses.replace(H100, fp8_tflops=None)))
    with pytest.raises(ConfigError, match="from blackwell on"):
        predict(question("precision.fp8=hybrid", "precision.fp8_recipe=mxfp8"))


def test_memory_of_weights_by_hand() -> None:
    elements = 4 * (4 * 4096**2 + 3 * 4096 * 8192) // 2
    assert linear_weights(config(), 0) == elements
    plain, copied, alone = (_static(*overrides) for overrides in ((), FP8, GATHERED))
    assert copied - plain == 2 * elements
    assert alone - plain == 0  # two bytes of FP8 instead of two of bf16
    assert _static(*FP8, architecture="blackwell") - plain == elements


def _static(*overrides: str, architecture: str = "hopper") -> float:
    """Allocated bytes without the difference in activations."""
    job = config(*overrides)
    whole = allocated_bytes(job, Layout.from_config(job.parallel, 8), architecture)[0]
    return whole - 4 * layer_activation_bytes(job, moe=False)


def test_activations_of_a_layer_by_hand() -> None:
    plain, narrow = (layer_activation_bytes(config(*overrides), moe=False) for overrides in ((), FP8))
    # Both norms' outputs on this rank's half of the tokens, and this rank's half of the inner channels.
    assert plain - narrow == 2048 * 2 * 4096 + 4096 * 8192 // 2


def test_the_command_searches_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", "--model", "llama3-8b", "--gpus", "8", "--global-batch-size", "64", "--top", "1", *FP8]
    assert main([*job, "--cluster", "h100"]) == 0
    printed = capsys.readouterr()
    assert "fit" in printed.out and "products in FP8 are taken to reach" in printed.err
    assert main([*job, "--cluster", "a100"]) == 2
    assert "GPUs have that from hopper on" in capsys.readouterr().err
