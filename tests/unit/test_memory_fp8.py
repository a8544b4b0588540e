"""FP8 in the dry world: copies of weights, saved inputs and parameters by hand, and where it is refused."""

from __future__ import annotations

import functools

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.memory.rank import RankTrace
from megatron_slm.parallel import device
from megatron_slm.parallel.fp8 import require_engine, require_generation
from megatron_slm.train.config import PrecisionConfig

device.preload("cpu")

from megatron_slm.memory.fit import candidates  # noqa: E402
from megatron_slm.memory.ledger import Ledger, ledger  # noqa: E402
from megatron_slm.memory.replay import replay, saved_blocks  # noqa: E402
from megatron_slm.memory.trace import COPIES  # noqa: E402
from megatron_slm.parallel.declared_ops import Generation, Kernels  # noqa: E402
from megatron_slm.run_dry import job_trace  # noqa: E402

HIDDEN, INNER, LAYERS, LENGTH = 256, 512, 2, 128
SMALL = (
    f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={INNER}", f"model.num_layers={LAYERS}",
    "model.num_attention_heads=4", f"model.seq_length={LENGTH}", "model.vocab_size=512", "precision.bf16=true",
    "train.global_batch_size=8",
)  # fmt: skip
LINEAR = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
"""Elements of all matrices of the layers: joint queries, keys and values, projection, gated MLP."""
SCALES = 2048
"""Bytes that the scales of this model's tensors are less than, where a tensor has one."""
SEQUENCE = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
EXPERTS = (
    "model.num_moe_experts=4", "model.moe_ffn_hidden_size=256", "parallel.expert_model_parallel_size=2",
    "parallel.moe_grouped_gemm=true", "parallel.device=cuda",
)  # fmt: skip
TENSORWISE = ("precision.fp8=hybrid", "precision.fp8_recipe=tensorwise")


@functools.cache
def traced(*overrides: str, world: int = 2, generation: Generation = "hopper") -> RankTrace:
    found = config(*overrides)
    assert violations(found, world) == []
    kernels = Kernels(generation=generation)
    return job_trace(found, 0, world_size=world, for_gpu=True, kernels=kernels)


def config(*overrides: str) -> RunConfig:
    keys = {override.partition("=")[0] for override in overrides}
    return load(None, (*(one for one in SMALL if one.partition("=")[0] not in keys), *overrides)).config


def recipe(name: str) -> tuple[str, str]:
    return "precision.fp8=hybrid", f"precision.fp8_recipe={name}"


def copies(trace: RankTrace) -> int:
    """Bytes of copies of weights that are there between micro-batches."""
    static = {part.block for part in trace.static}
    kept = static.union(trace.persistent)
    return sum(block.size for number, block in enumerate(trace.blocks) if block.kind == COPIES and number in kept)


def saved(trace: RankTrace) -> int:
    """Bytes that the layers keep of a micro-batch."""
    return sum(trace.blocks[number].size for number in saved_blocks(trace) if "layers" in trace.blocks[number].module)


def sent(trace: RankTrace, name: str) -> int:
    return sum(op.moved_bytes for phase in trace.phases.values() for op in phase.ops if name in op.name)


def state(trace: RankTrace, kind: str) -> int:
    return sum(part.size for part in trace.static if part.kind == kind)


def ledger_of(trace: RankTrace) -> Ledger:
    return ledger(trace, replay(trace))


@pytest.mark.parametrize(
    ("name", "generation", "bytes_of_an_element"),
    [
        ("delayed", "hopper", 2),
        ("tensorwise", "hopper", 2),
        ("tensorwise", "blackwell", 1),  # multiplies along rows and along columns
        ("blockwise", "hopper", 2),
        ("mxfp8", "blackwell", 2 * (1 + 1 / 32)),  # a byte of scale for 32 elements
    ],
)
def test_copies_of_weights(name: str, generation: Generation, bytes_of_an_element: float) -> None:
    trace = traced(*recipe(name), generation=generation)
    assert copies(trace) == pytest.approx(bytes_of_an_element * LINEAR, abs=SCALES)
    assert state(trace, "parameters") == state(traced(), "parameters"), "the weights themselves stay in bf16"


def test_the_ledger_has_them_as_rows_of_their_own_that_are_exact() -> None:
    trace = traced(*TENSORWISE)
    found = ledger_of(trace)
    rows = [row for row in found.rows if row.kind == COPIES]
    assert sum(row.size for row in rows) == copies(trace) == found.by_kind()[COPIES]
    assert all(row.low == row.size == row.high and row.begins == 0 for row in rows)
    assert {row.layer for row in rows} == {"layer_0", "layer_1"}, "embedding and output layer stay in bf16"


def test_what_a_layer_saves() -> None:
    """In FP8 both norms' outputs and the MLP's inner activations have one byte instead of two."""
    narrower = LAYERS * LENGTH * (2 * HIDDEN + INNER)
    assert saved(traced()) - saved(traced(*TENSORWISE)) == pytest.approx(narrower, abs=SCALES)
    # Delayed scaling saves a copy of the attention's output too, which the attention keeps in bf16 itself.
    further = LAYERS * LENGTH * HIDDEN
    assert saved(traced()) - saved(traced(*recipe("delayed"))) == pytest.approx(narrower - further, abs=SCALES)


def test_inputs_and_gradients_are_gathered_in_fp8() -> None:
    """Sequence parallel: what linear layers gather halves; the embedding's gradient and the output layer's stay."""
    rows = LENGTH * HIDDEN * 2  # of all tokens, in bf16
    # Of a layer: two inputs, both again in the backward pass, and two gradients.
    difference = sent(traced(*SEQUENCE), "_allgather_base_") - sent(traced(*SEQUENCE, *TENSORWISE), "_allgather_base_")
    assert difference == LAYERS * 6 * rows / 2
    assert sent(traced(*SEQUENCE), "_reduce_scatter") == sent(traced(*SEQUENCE, *TENSORWISE), "_reduce_scatter")


@pytest.mark.parametrize(("generation", "transposed"), [("hopper", 1), ("blackwell", 0)])
def test_parameters_in_fp8(generation: Generation, transposed: int) -> None:
    trace = traced(*TENSORWISE, "precision.fp8_param_gather=true", generation=generation)
    plain = traced(generation=generation)
    assert state(plain, "parameters") - state(trace, "parameters") == pytest.approx(LINEAR, abs=SCALES)
    assert copies(trace) == pytest.approx(transposed * LINEAR, abs=SCALES)
    everything = [sum(part.size for part in each.static) for each in (plain, trace)]
    assert everything[0] - everything[1] == pytest.approx((1 - transposed) * LINEAR, rel=0.01, abs=SCALES)
    for kind in ("gradients", "master weights", "moments"):
        assert state(trace, kind) == pytest.approx(state(plain, kind), rel=0.01), kind


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize(
    "overrides",
    [
        (
            *SEQUENCE,
            "train.recompute_granularity=full",
            "train.recompute_method=uniform",
            "train.recompute_num_layers=1",
        ),
        (*EXPERTS, "train.recompute_granularity=selective", "train.recompute_modules=moe"),
        (*EXPERTS, "precision.fp8_param_gather=true"),
    ],
    ids=["recomputed layers", "recomputed experts", "experts in FP8"],
)
def test_every_recipe_steps(name: str, overrides: tuple[str, ...]) -> None:
    trace = traced(*recipe(name), *overrides)
    found = ledger_of(trace)
    assert found.size == replay(trace).peak_bytes
    assert copies(trace) > 0


def test_experts_have_a_copy_each() -> None:
    held = 2 * 3 * HIDDEN * 256 * LAYERS  # two experts of a rank
    attention = LAYERS * 4 * HIDDEN**2
    assert copies(traced(*TENSORWISE, *EXPERTS)) == pytest.approx(2 * (held + attention), abs=2 * SCALES)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("precision.fp8_recipe=mxfp8",), "would be ignored"),
        (("precision.fp8=hybrid", "precision.bf16=false"), "precision.bf16=true"),
        (("precision.fp8=hybrid", "parallel.device=cpu"), "on a GPU alone"),
        (
            ("precision.fp8=hybrid", "precision.fp8_param_gather=true", "parallel.use_distributed_optimizer=false"),
            "use_distributed_optimizer=true",
        ),
        ((*recipe("mxfp8"), "precision.fp8_param_gather=true"), "another recipe"),
        (("precision.fp8=hybrid", "model.ffn_hidden_size=520"), "multiples of 16"),
        ((*recipe("mxfp8"), "model.seq_length=80"), "multiples of 32"),
    ],
)
def test_what_the_rules_refuse(overrides: tuple[str, ...], told: str) -> None:
    found = violations(config(*overrides), 2)
    assert len(found) == 1 and told in found[0]


def test_where_it_cannot_be_computed() -> None:
    with pytest.raises(ConfigError, match="on CPU ranks"):
        require_engine(PrecisionConfig(fp8="hybrid"), "cpu")
    with pytest.raises(ConfigError, match="from blackwell on"):
        require_generation(PrecisionConfig(fp8="e4m3", fp8_recipe="mxfp8"), "hopper", "h100-80gb")
    require_generation(PrecisionConfig(fp8="e4m3", fp8_recipe="mxfp8"), "blackwell", "b200")
    require_engine(PrecisionConfig(), "cpu")


def test_the_command_takes_megatrons_flags_and_refuses_cpu_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "parallel.world_size=1"]
    assert main(["memory", *SMALL, *flags, "--gpu", "h100"]) == 0
    assert "weight copies" in capsys.readouterr().out
    assert main(["memory", *SMALL, *flags, "--cpu"]) == 2
    assert "on CPU ranks" in capsys.readouterr().err
    assert main(["memory", *SMALL, *flags, "--gpu", "a100"]) == 2
    assert "from hopper on" in capsys.readouterr().err


def test_fit_offers_fp8_and_the_way_back() -> None:
    offered = {candidate.name for candidate in candidates(config())}
    assert {"products in FP8", "products and weights in FP8"} <= offered
    assert {"products in bf16", "weights in FP8"} <= {one.name for one in candidates(config(*TENSORWISE))}
